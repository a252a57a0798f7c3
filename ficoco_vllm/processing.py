"""Per-request budget and number of placeholders of an image, decided before any pixel is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.llava import (
    BaseLlavaMultiModalProcessor,
    BaseLlavaProcessingInfo,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate, PromptUpdateDetails
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.request_fields import (
    BUDGET,
    FIELD,
    KEEP,
    METHOD,
    PREFIX,
    SIZES,
    TRACE,
    check_trace_id,
    find_unknown,
    unknown_field,
)

# Part of the multimodal hash, with budget and method, so that servers that share a cache never mix settings.
SETTINGS = "ficoco_settings"


@dataclass
class SizedPlaceholders(PromptUpdateDetails):
    """Placeholders of an image, with its size.

    vLLM's caches keep them beside the processed image, so that the size of an image whose request brings only its uuid
    is that of the image in the cache.

    Attributes:
        size: height and width in pixels.
    """

    size: tuple[int, int] = (0, 0)


@dataclass
class SizedInputs(ProcessorInputs):
    """vLLM's inputs of one prompt, with the size of each image once it is processed or found in the cache.

    Attributes:
        sizes: height and width in pixels of each image.
    """

    sizes: tuple[tuple[int, int], ...] = ()


class ReducingInfo(BaseLlavaProcessingInfo):
    """Mixin for vLLM's processing info of a LLaVA: the number of tokens that an image keeps.

    Attributes:
        default_keep: maps the method that a request names, or None, to the budget if it names none; set in the
            API server where the budget follows the load, otherwise the server's budget applies.
    """

    default_keep: Callable[[str | None], int] | None = None

    @property
    def planner(self) -> VisionPlanner:
        """The tower's plans under the settings of the server."""
        hf_config = self.get_hf_config()
        return VisionPlanner.shared(FicocoConfig.of(hf_config), TowerShape.from_hf_config(hf_config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image whose request names no budget."""
        planner = self.planner
        return planner.num_image_tokens(planner.default, height=image_height, width=image_width)

    def with_default(self, mm_kwargs: Mapping[str, object]) -> Mapping[str, object]:
        """Add the budget that follows the load if a request names none.

        Args:
            mm_kwargs: the request's `mm_processor_kwargs`, which override the server's.
        """
        if self.default_keep is None or not self.planner.active:
            return mm_kwargs
        merged = self.ctx.get_merged_mm_kwargs(mm_kwargs)
        if merged.get(KEEP) is not None:
            return mm_kwargs
        method = merged.get(METHOD)
        return {**mm_kwargs, KEEP: self.default_keep(None if method is None else str(method))}

    def admit(self, mm_kwargs: Mapping[str, object], sizes: Sequence[tuple[int, int]]) -> Budget:
        """Validate method and budget of a request, once; a refusal is counted.

        Args:
            mm_kwargs: the request's `mm_processor_kwargs`, which override the server's.
            sizes: height and width in pixels of each image, which must be able to meet the budget.

        Raises:
            VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
        """
        try:
            return self._budget(self.ctx.get_merged_mm_kwargs(mm_kwargs), sizes)
        except VLLMValidationError:
            count_refusal(self.ctx.model_config)
            raise

    def check_embeddings(self, mm_kwargs: Mapping[str, object], budget: Budget) -> None:
        """Refuse a budget beside embeddings, which the tower does not see; a refusal is counted.

        Args:
            mm_kwargs: the request's own `mm_processor_kwargs`.
            budget: that follows from them.

        Raises:
            VLLMValidationError: naming the field and what is allowed (HTTP 400).
        """
        named = any(mm_kwargs.get(name) is not None for name in (KEEP, METHOD))
        if named and self.planner.active and self.planner.reduces(budget):
            count_refusal(self.ctx.model_config)
            raise VLLMValidationError(
                f"{FIELD} beside image_embeds is not allowed where the vision tower reduces, which does not see "
                f'embeddings; allowed: images, or "{FIELD}": "off", or no {FIELD} (no {KEEP}, no {METHOD})',
                parameter=FIELD,
            )

    def _budget(self, fields: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> Budget:
        planner = self.planner
        config = FicocoConfig.of(self.get_hf_config())
        unknown = find_unknown((name for name in fields if name != SETTINGS), explain=config.explain)
        if unknown is not None:
            raise VLLMValidationError(unknown_field(unknown), parameter=unknown, value=fields[unknown])
        named = next((name for name in (KEEP, METHOD) if fields.get(name) is not None), None)
        if named is not None and config.method is not None and not planner.active:
            raise VLLMValidationError(
                f"{named} in mm_processor_kwargs is for methods of the vision tower; "
                f"{config.method} works in the decoder: send it in vllm_xargs",
                parameter=named,
            )
        try:
            if TRACE in fields:
                check_trace_id(fields[TRACE])
            budget = planner.budget(fields.get(METHOD), fields.get(KEEP))
        except ValueError as error:
            field = next((name for name in (METHOD, TRACE) if str(error).startswith(name)), KEEP)
            raise VLLMValidationError(str(error), parameter=field) from error
        try:
            for height, width in sizes:
                planner.num_image_tokens(budget, height=height, width=width)
        except ValueError as error:
            raise VLLMValidationError(f"{KEEP} = {budget.keep}: {error}", parameter=KEEP) from error
        return budget


class ReducingProcessor(BaseLlavaMultiModalProcessor[Any]):
    """Mixin for vLLM's processor of a LLaVA: a budget for each request.

    The budget travels in the processor's keyword arguments, which are part of the multimodal hash: neither the
    processor cache nor the encoder cache nor the prefix cache can mix two budgets. The trace id of a request is part of
    the hash too, so that a traced request hits none of these caches and its trace shows its own run.
    """

    info: ReducingInfo

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Validate the budget, write it into the keyword arguments in one form, and process as vLLM does.

        Args:
            inputs: prompt, images and the request's keyword arguments.
            timing_ctx: see vLLM.

        Raises:
            VLLMValidationError: the budget is not allowed.
        """
        fields = self.info.with_default(inputs.hf_processor_mm_kwargs)
        images = inputs.mm_data_items.get("image")
        uuid_alone = isinstance(images, ImageProcessorItems) and any(
            image is None for image in images.get_all()
        )
        if uuid_alone and inputs.cache is None:
            raise ValueError("an image that is named by its uuid alone needs a processor cache, which is off")
        budget = self.info.admit(fields, _known_sizes(images))
        if isinstance(images, ImageEmbeddingItems):
            self.info.check_embeddings(inputs.hf_processor_mm_kwargs, budget)
        kwargs = _without_ours(fields)
        if self.info.planner.active:  # otherwise the hashes are those of stock vLLM
            kwargs[KEEP] = budget.keep
            kwargs[METHOD] = budget.method
            kwargs[SETTINGS] = self.info.planner.fingerprint
            if TRACE in fields:
                kwargs[TRACE] = check_trace_id(fields[TRACE])
        sized = SizedInputs(**{**vars(inputs), "hf_processor_mm_kwargs": kwargs})
        result: Any = super().apply(sized, timing_ctx)
        if sized.sizes:
            result[BUDGET], result[SIZES] = budget, sized.sizes
        return cast(MultiModalInput, result)

    def _cached_apply_hf_processor(
        self, inputs: ProcessorInputs, timing_ctx: TimingContext
    ) -> MultiModalProcessingResult:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)
        contents = [update.content for (update,) in result.prompt_updates.get("image", ())]
        cast(SizedInputs, inputs).sizes = tuple(
            content.size for content in contents if isinstance(content, SizedPlaceholders)
        )
        return result

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        return super()._call_hf_processor(hf_data, _without_ours(hf_kwargs))

    def _admitted(self, kwargs: Mapping[str, Any]) -> Budget:
        """The budget that `apply` has validated and written."""
        return Budget(kwargs[METHOD], kwargs[KEEP]) if KEEP in kwargs else self.info.planner.default

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        processed_data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        pixels = processed_data.get("pixel_values")
        if pixels is not None and KEEP in hf_processor_mm_kwargs:
            method, keep = self._admitted(hf_processor_mm_kwargs)
            fields = {KEEP: keep, METHOD: self.info.planner.method_index(method)}
            if TRACE in hf_processor_mm_kwargs:
                fields[TRACE] = cast(int, hf_processor_mm_kwargs[TRACE])
            for name, value in fields.items():
                processed_data[name] = torch.full((len(pixels),), value)
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        # On the CPU, where they are read to group the images of a step.
        for name in (KEEP, METHOD, TRACE):
            fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_token_id = self.info.get_hf_config().image_token_index
        budget = self._admitted(hf_processor_mm_kwargs)
        planner = self.info.planner

        def replacement(item_index: int) -> list[int] | SizedPlaceholders:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):  # the client decides whether these are reduced
                return [image_token_id] * images.get_feature_size(item_index)
            size = images.get_image_size(item_index)
            num_tokens = planner.num_image_tokens(budget, height=size.height, width=size.width)
            return SizedPlaceholders([image_token_id] * num_tokens, size=(size.height, size.width))

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=replacement)]


class FicocoProcessingInfo(ReducingInfo, LlavaProcessingInfo):
    """LLaVA's processing info, with the number of tokens that an image keeps."""


class FicocoMultiModalProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA's processor, with a budget for each request."""

    info: FicocoProcessingInfo


class FicocoNextProcessingInfo(ReducingInfo, LlavaNextProcessingInfo):
    """LLaVA-NeXT's processing info, with the number of tokens that an image keeps."""


class FicocoNextProcessor(ReducingProcessor, LlavaNextMultiModalProcessor[FicocoNextProcessingInfo]):
    """LLaVA-NeXT's processor, with a budget for each request."""

    info: FicocoNextProcessingInfo


def reducible(hf_config: Any) -> bool:
    """Whether the tower of a model can be reduced; if not, vLLM's own processor serves it.

    Args:
        hf_config: transformers' configuration of the model.
    """
    try:
        TowerShape.from_hf_config(hf_config)
    except ValueError:
        return False
    return True


def _known_sizes(images: Any) -> list[tuple[int, int]]:
    """Height and width of the images whose data are here; what is no image is left to vLLM's error."""
    sizes: list[tuple[int, int]] = []
    if not isinstance(images, ImageProcessorItems):
        return sizes
    for index, image in enumerate(images.get_all()):
        if isinstance(image, Image) or (isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 3):
            size = images.get_image_size(index)
            sizes.append((size.height, size.width))
    return sizes


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if not key.startswith(PREFIX)}
