"""Prompt length and per-request budget: how many placeholders an image takes, decided before any pixel is seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.llava import (
    BaseLlavaMultiModalProcessor,
    BaseLlavaProcessingInfo,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing import PromptReplacement, PromptUpdate
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.tracing.store import TRACE, check_trace_id

# What a request may say in `mm_processor_kwargs`.
KEEP = "ficoco_keep"
METHOD = "ficoco_method"
# What stands in the multimodal hash beside them, so that no cache shared by servers mixes settings.
SETTINGS = "ficoco_settings"
PREFIX = "ficoco_"
# Where a processed prompt carries its `Budget` through the front end, and height and width of its images in pixels.
BUDGET = "ficoco_budget"
SIZES = "ficoco_sizes"


class ReducingInfo(BaseLlavaProcessingInfo):
    """To be put in front of the processing facts of a LLaVA of vLLM's: how many tokens an image keeps by default.

    Attributes:
        default_keep: the budget of a request that names none, given the method that it names or None; set in the
            API server where the budget follows the load, otherwise it is the server's.
    """

    default_keep: Callable[[str | None], int] | None = None

    @property
    def planner(self) -> VisionPlanner:
        """The plans of this model under the settings that the server was started with."""
        hf_config = self.get_hf_config()
        return VisionPlanner.shared(FicocoConfig.of(hf_config), TowerShape.from_hf_config(hf_config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Placeholders of an image whose request names no budget."""
        planner = self.planner
        return planner.num_image_tokens(planner.default, height=image_height, width=image_width)

    def filled(self, mm_kwargs: Mapping[str, object]) -> Mapping[str, object]:
        """The keyword arguments of a request that has just come in, with a budget where it names none.

        Args:
            mm_kwargs: the request's `mm_processor_kwargs`; the server's own are merged below them.
        """
        if self.default_keep is None or not self.planner.active:
            return mm_kwargs
        merged = self.ctx.get_merged_mm_kwargs(mm_kwargs)
        if merged.get(KEEP) is not None:
            return mm_kwargs
        method = merged.get(METHOD)
        return {**mm_kwargs, KEEP: self.default_keep(None if method is None else str(method))}

    def budget(self, mm_kwargs: Mapping[str, object]) -> Budget:
        """Method and budget of a request.

        Args:
            mm_kwargs: the request's `mm_processor_kwargs`; the server's own are merged below them.

        Raises:
            VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
        """
        merged = self.ctx.get_merged_mm_kwargs(mm_kwargs)
        config = FicocoConfig.of(self.get_hf_config())
        known = (KEEP, METHOD, SETTINGS, TRACE) if config.explain else (KEEP, METHOD, SETTINGS)
        unknown = sorted(key for key in merged if key.startswith(PREFIX) and key not in known)
        if unknown:
            raise VLLMValidationError(
                f"{unknown[0]} is not a field of this server; allowed: {KEEP}, {METHOD}",
                parameter=unknown[0],
                value=merged[unknown[0]],
            )
        asked = next((name for name in (KEEP, METHOD) if merged.get(name) is not None), None)
        if asked is not None and config.method is not None and not self.planner.active:
            raise VLLMValidationError(
                f"{asked} in mm_processor_kwargs is for methods of the vision tower; "
                f"{config.method} works in the decoder: send it in vllm_xargs",
                parameter=asked,
            )
        try:
            if TRACE in merged:
                check_trace_id(merged[TRACE])
            return self.planner.budget(merged.get(METHOD), merged.get(KEEP))
        except ValueError as error:
            field = next((name for name in (METHOD, TRACE) if str(error).startswith(name)), KEEP)
            raise VLLMValidationError(str(error), parameter=field) from error

    def admit(self, mm_kwargs: Mapping[str, object], sizes: Sequence[tuple[int, int]]) -> Budget:
        """Method and budget of a request that has just come in; see `budget`. A refusal is counted.

        Args:
            mm_kwargs: see `budget`.
            sizes: height and width in pixels of each image, which must be able to meet the budget.
        """
        try:
            budget = self.budget(mm_kwargs)
            try:
                for height, width in sizes:
                    self.planner.num_image_tokens(budget, height=height, width=width)
            except ValueError as error:
                raise VLLMValidationError(f"{KEEP} = {budget.keep}: {error}", parameter=KEEP) from error
            return budget
        except VLLMValidationError:
            count_refusal(self.ctx.model_config)
            raise


class FicocoProcessingInfo(ReducingInfo, LlavaProcessingInfo):
    """LLaVA's processing facts, with the number of tokens that an image keeps by default."""


class ReducingProcessor(BaseLlavaMultiModalProcessor[Any]):
    """To be put in front of a LLaVA processor of vLLM's: a budget per request.

    The budget travels in the processor's keyword arguments, which are part of the multimodal hash: neither the
    processor cache nor the encoder cache nor the prefix cache can mix two budgets. So does the mark of a request that
    is traced, which therefore finds nothing in any of them: what is traced has run for that very request.
    """

    info: ReducingInfo

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """Check the budget, write it down in one form, and process as vLLM does.

        Args:
            inputs: prompt, images and the request's keyword arguments.
            timing_ctx: as vLLM hands it in.

        Raises:
            VLLMValidationError: the budget is not allowed.
        """
        inputs = replace(inputs, hf_processor_mm_kwargs=self.info.filled(inputs.hf_processor_mm_kwargs))
        images = inputs.mm_data_items.get("image")
        sizes = _sizes(images) if isinstance(images, ImageProcessorItems) else []
        budget = self.info.admit(inputs.hf_processor_mm_kwargs, sizes)
        kwargs = _without_ours(inputs.hf_processor_mm_kwargs)
        if self.info.planner.active:  # else nothing is written down, and the hashes are those of stock vLLM
            kwargs[KEEP] = budget.keep
            kwargs[METHOD] = budget.method
            kwargs[SETTINGS] = self.info.planner.fingerprint
            if TRACE in inputs.hf_processor_mm_kwargs:
                kwargs[TRACE] = check_trace_id(inputs.hf_processor_mm_kwargs[TRACE])
        result: Any = super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        if sizes:  # for what is told of the request; embeddings are not reduced
            result[BUDGET], result[SIZES] = budget, tuple(sizes)
        return cast(MultiModalInput, result)

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        return super()._call_hf_processor(hf_data, _without_ours(hf_kwargs))

    def _postprocess_hf_mm_data(
        self,
        mm_inputs: Mapping[str, object],
        hf_processor_mm_kwargs: Mapping[str, object],
        processed_data: BatchFeature,
    ) -> BatchFeature:
        processed_data = super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)
        pixels = processed_data.get("pixel_values")
        if pixels is not None and KEEP in hf_processor_mm_kwargs:
            budget = self.info.budget(hf_processor_mm_kwargs)
            processed_data[KEEP] = torch.full((len(pixels),), budget.keep)
            processed_data[METHOD] = torch.full((len(pixels),), self.info.planner.method_index(budget.method))
            if TRACE in hf_processor_mm_kwargs:
                processed_data[TRACE] = torch.full(
                    (len(pixels),), check_trace_id(hf_processor_mm_kwargs[TRACE])
                )
        return processed_data

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        # Read on the host to group the images of a step, so they stay there.
        fields[KEEP] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[METHOD] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[TRACE] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        image_token_id = self.info.get_hf_config().image_token_index
        budget = self.info.budget(hf_processor_mm_kwargs)
        planner = self.info.planner

        def replacement(item_index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(
                images, ImageEmbeddingItems
            ):  # embeddings come reduced or not, as their sender chose
                return [image_token_id] * images.get_feature_size(item_index)
            size = images.get_image_size(item_index)
            num_tokens = planner.num_image_tokens(budget, height=size.height, width=size.width)
            return [image_token_id] * num_tokens

        return [PromptReplacement(modality="image", target=[image_token_id], replacement=replacement)]


class FicocoMultiModalProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA's processor, with a budget per request."""

    info: FicocoProcessingInfo


def reducible(hf_config: Any) -> bool:
    """Whether a model can be reduced; if not, vLLM's own processor serves it.

    Args:
        hf_config: transformers' configuration of the model.
    """
    try:
        TowerShape.from_hf_config(hf_config)
    except ValueError:
        return False
    return True


def _sizes(images: ImageProcessorItems) -> list[tuple[int, int]]:
    sizes = [images.get_image_size(index) for index in range(len(images))]
    return [(size.height, size.width) for size in sizes]


def _without_ours(kwargs: Mapping[str, object]) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if not key.startswith(PREFIX)}
