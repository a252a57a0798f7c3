"""Per-request budget and number of placeholders of an image, decided before any pixel is read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import (
    DictEmbeddingItems,
    ImageEmbeddingItems,
    ImageProcessorItems,
    MultiModalDataItems,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    PromptReplacement,
    PromptUpdate,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs
from vllm.multimodal.processing.processor import MultiModalProcessingResult

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.planning.families import family, read_image_settings, tower_shape
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import IMAGES, image_settings
from ficoco_vllm.request_fields import (
    BUDGET,
    FIELD,
    KEEP,
    KEEP_RATIO,
    METHOD,
    PREFIX,
    QUESTION,
    SIZES,
    TRACE,
    check_question,
    check_trace_id,
    find_unknown,
    unknown_field,
)
from ficoco_vllm.vision.text_encoder import text_tokenizer

# Part of the multimodal hash, with budget and method, so that servers that share a cache never mix settings.
SETTINGS = "ficoco_settings"


@dataclass
class SizedPlaceholders(PromptUpdateDetails):
    """Placeholders of an image, with its size.

    vLLM's caches store them with the processed image, so an image that a request names only by its uuid has the size of
    the cached one.

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


class ReducingInfo(BaseProcessingInfo):
    """Mixin for vLLM's processing info of a model: the number of tokens that an image keeps.

    Attributes:
        default_keep: maps the method that a request names, or None, to the budget if it names none; set in the
            API server where the budget follows the load, otherwise the server's budget applies.
    """

    default_keep: Callable[[str | None], int] | None = None

    @property
    def planner(self) -> VisionPlanner:
        """The tower's plans under the settings of the server."""
        hf_config = self.get_hf_config()
        return VisionPlanner.shared(FicocoConfig.of(hf_config), tower_shape(hf_config))

    def get_num_image_tokens(self, *, image_width: int, image_height: int, **_: object) -> int:
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
        merged = self._merged(mm_kwargs)
        if merged.get(KEEP) is not None or merged.get(KEEP_RATIO) is not None:
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
            return self._budget(self._merged(mm_kwargs), sizes)
        except VLLMValidationError:
            count_refusal(self.ctx.model_config)
            raise

    def check_embeddings(self, mm_kwargs: Mapping[str, object], budget: Budget) -> None:
        """Refuse a budget together with embeddings, which the tower does not see; a refusal is counted.

        Args:
            mm_kwargs: the request's own `mm_processor_kwargs`.
            budget: the budget that follows from them.

        Raises:
            VLLMValidationError: naming the field and what is allowed (HTTP 400).
        """
        named = any(mm_kwargs.get(name) is not None for name in (KEEP, KEEP_RATIO, METHOD))
        if named and self.planner.active and self.planner.reduces(budget):
            count_refusal(self.ctx.model_config)
            raise VLLMValidationError(
                f"{FIELD} together with image_embeds is not allowed where the vision tower reduces, which does not see "
                f'embeddings; allowed: images, or "{FIELD}": "off", or no {FIELD} (no {KEEP}, no {METHOD})',
                parameter=FIELD,
            )

    def _check_image_settings(self, fields: Mapping[str, Any]) -> None:
        """Refuse a request that changes the number of tokens that a plan gives an image."""
        hf_config = self.get_hf_config()
        requested = read_image_settings(hf_config, fields, lambda: self.get_hf_processor().image_processor)
        for name, value in (requested or {}).items():
            served = image_settings(hf_config)[name]
            if value != served:
                raise VLLMValidationError(
                    f"{name} = {value!r} in mm_processor_kwargs is not allowed on a server that reduces, whose images "
                    f"are all cut in the same way; allowed: {served!r}, set at start-up with --mm-processor-kwargs",
                    parameter=name,
                    value=value,
                )

    def _merged(self, mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        """The request's arguments over the server's; a budget replaces one of the other kind."""
        merged = dict(self.ctx.get_merged_mm_kwargs(mm_kwargs))
        for name, other in ((KEEP, KEEP_RATIO), (KEEP_RATIO, KEEP)):
            if mm_kwargs.get(name) is not None and mm_kwargs.get(other) is None:
                merged.pop(other, None)
        return merged

    def _budget(self, fields: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> Budget:
        planner = self.planner
        config = FicocoConfig.of(self.get_hf_config())
        unknown = find_unknown(
            (name for name in fields if name != SETTINGS), explain=config.explain, tower=True
        )
        if unknown is not None:
            raise VLLMValidationError(unknown_field(unknown), parameter=unknown, value=fields[unknown])
        if planner.active:
            self._check_image_settings(fields)
        named = next((name for name in (KEEP, KEEP_RATIO, METHOD) if fields.get(name) is not None), None)
        if named is not None and config.method is not None and not planner.active:
            raise VLLMValidationError(
                f"{named} in mm_processor_kwargs is for methods of the vision tower; "
                f"{config.method} works in the decoder: send it in vllm_xargs",
                parameter=named,
            )
        try:
            if TRACE in fields:
                check_trace_id(fields[TRACE])
            if QUESTION in fields:
                check_question(fields[QUESTION])
            budget = planner.budget(fields.get(METHOD), fields.get(KEEP), fields.get(KEEP_RATIO))
        except ValueError as error:
            field = next(
                (name for name in (METHOD, TRACE, QUESTION, KEEP_RATIO) if str(error).startswith(name)), KEEP
            )
            raise VLLMValidationError(str(error), parameter=field) from error
        try:
            for height, width in sizes:
                planner.num_image_tokens(budget, height=height, width=width)
        except ValueError as error:
            raise VLLMValidationError(f"{KEEP} = {budget.keep}: {error}", parameter=KEEP) from error
        return budget


class ReducingProcessor(BaseMultiModalProcessor[Any]):
    """Mixin for vLLM's processor of a model: a budget for each request.

    The budget travels in the processor's keyword arguments, which are part of the multimodal hash: neither the
    processor cache nor the encoder cache nor the prefix cache can mix two budgets, or two questions where the method
    reads them. The trace id of a request is part of the hash too, so that a traced request hits none of these caches,
    and its trace shows its own run.
    """

    info: ReducingInfo

    def num_images(self, processed: BatchFeature) -> int:
        """Images whose pixels have been processed together.

        Args:
            processed: output of the model's own processor.
        """
        return len(processed.get("pixel_values", ()))

    def placeholder(self, num_tokens: int) -> PromptUpdateDetails:
        """Tokens of an image in the prompt.

        Args:
            num_tokens: number of tokens that its embeddings replace.
        """
        return PromptUpdateDetails([self.info.get_hf_config().image_token_id] * num_tokens)

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
        if isinstance(images, ImageEmbeddingItems | DictEmbeddingItems):
            self.info.check_embeddings(inputs.hf_processor_mm_kwargs, budget)
        kwargs = without_ours(fields)
        if self.info.planner.active:  # otherwise the hashes are those of stock vLLM
            kwargs[KEEP] = budget.keep
            kwargs[METHOD] = budget.method
            if budget.ratio is not None:
                kwargs[KEEP_RATIO] = budget.ratio
            kwargs[SETTINGS] = self.info.planner.fingerprint
            if TRACE in fields:
                kwargs[TRACE] = check_trace_id(fields[TRACE])
            if self.info.planner.reduces(budget) and self.info.planner.reads_question(budget.method):
                given = fields.get(QUESTION)
                kwargs[QUESTION] = self._text_of(inputs.prompt) if given is None else given
        sized = SizedInputs(**{**vars(inputs), "hf_processor_mm_kwargs": kwargs})
        result: Any = super().apply(sized, timing_ctx)
        if sized.sizes:
            result[BUDGET], result[SIZES] = budget, sized.sizes
        return cast(MultiModalInput, result)

    def _text_of(self, prompt: Sequence[int]) -> str:
        """The text of a prompt, used as the question where the request names none."""
        image = self.info.get_hf_config().image_token_id
        text = [token for token in prompt if token != image]
        return str(self.info.get_tokenizer().decode(text, skip_special_tokens=True))

    def _cached_apply_hf_processor(
        self, inputs: ProcessorInputs, timing_ctx: TimingContext
    ) -> MultiModalProcessingResult:
        result = super()._cached_apply_hf_processor(inputs, timing_ctx)
        contents = [update.content for (update,) in result.prompt_updates.get("image", ())]
        cast(SizedInputs, inputs).sizes = tuple(
            content.size for content in contents if isinstance(content, SizedPlaceholders)
        )
        return result

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, without_ours(hf_kwargs))
        num_images = self.num_images(processed)
        if num_images and KEEP in hf_kwargs:
            budget = self._admitted(hf_kwargs)
            fields: dict[str, float] = {
                KEEP: budget.keep,
                METHOD: self.info.planner.method_index(budget.method),
            }
            if budget.ratio is not None:
                fields[KEEP_RATIO] = budget.ratio
            if TRACE in hf_kwargs:
                fields[TRACE] = cast(int, hf_kwargs[TRACE])
            for name, value in fields.items():
                dtype = torch.float64 if isinstance(value, float) else torch.int64
                processed[name] = torch.full((num_images,), value, dtype=dtype)
            if QUESTION in hf_kwargs:
                processed[QUESTION] = self._question(str(hf_kwargs[QUESTION])).expand(num_images, -1)
        return processed

    def _question(self, text: str) -> torch.Tensor:
        """Tokens of a question, (M,) int64, of the model that reads it."""
        encoder = FicocoConfig.of(self.info.get_hf_config()).text_encoder
        tokenizer = self.info.get_tokenizer() if encoder is None else text_tokenizer(encoder)
        return torch.tensor(tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)

    def _admitted(self, kwargs: Mapping[str, Any]) -> Budget:
        """The budget that `apply` has validated and written."""
        if KEEP not in kwargs:
            return self.info.planner.default
        return Budget(kwargs[METHOD], kwargs[KEEP], kwargs.get(KEEP_RATIO))

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, without_ours(hf_processor_mm_kwargs)))
        # On the CPU, where they are read to group the images of a step.
        for name in (KEEP, KEEP_RATIO, METHOD, TRACE):
            fields[name] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        fields[QUESTION] = MultiModalFieldConfig.batched("image")
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        budget, planner = self._admitted(hf_processor_mm_kwargs), self.info.planner

        def replacement(stock: PromptReplacement, item_index: int) -> list[int] | PromptUpdateDetails:
            images = mm_items["image"]
            own = cast(Callable[[int], list[int] | PromptUpdateDetails], stock.replacement)
            if not isinstance(
                images, ImageProcessorItems
            ):  # embeddings: the client decides whether these are reduced
                return own(item_index)
            size = images.get_image_size(item_index)
            if planner.active:
                content = self.placeholder(
                    planner.num_image_tokens(budget, height=size.height, width=size.width)
                )
            else:
                stock_content = own(item_index)
                content = (
                    stock_content
                    if isinstance(stock_content, PromptUpdateDetails)
                    else PromptUpdateDetails(stock_content)
                )
            return SizedPlaceholders(**vars(content), size=(size.height, size.width))

        stock = super()._get_prompt_updates(mm_items, without_ours(hf_processor_mm_kwargs), out_mm_kwargs)
        return [
            replace(update, replacement=partial(replacement, update))
            if update.modality == "image"
            else update
            for update in stock
        ]


def register(
    info: type[ReducingInfo],
    processor: type[ReducingProcessor],
    stock_info: type[BaseProcessingInfo],
    stock_processor: type[BaseMultiModalProcessor[Any]],
    dummy_inputs: type[BaseDummyInputsBuilder[Any]],
) -> Callable[[type[Any]], type[Any]]:
    """Decorate a model class with its processing, vLLM's own where nothing can be reduced; see `_reducible`.

    Args:
        info: our processing info.
        processor: our processor.
        stock_info: vLLM's processing info.
        stock_processor: vLLM's processor.
        dummy_inputs: vLLM's builder of dummy inputs.
    """

    def build_info(ctx: InputProcessingContext) -> BaseProcessingInfo:
        return info(ctx) if _reducible(ctx.get_hf_config()) else stock_info(ctx)

    def build_processor(given: Any, *args: Any, **kwargs: Any) -> BaseMultiModalProcessor[Any]:
        return (processor if isinstance(given, info) else stock_processor)(given, *args, **kwargs)

    decorate: Callable[[type[Any]], type[Any]] = MULTIMODAL_REGISTRY.register_processor(
        build_processor, info=build_info, dummy_inputs=dummy_inputs
    )
    return decorate


def _reducible(hf_config: Any) -> bool:
    try:
        if family(hf_config).image_settings is not None and not hasattr(hf_config, IMAGES):
            return False  # a server without our settings
        tower_shape(hf_config)
    except ValueError:
        return False
    return True


def _known_sizes(images: Any) -> list[tuple[int, int]]:
    """Height and width of the images whose data are here; vLLM reports whatever is not an image."""
    sizes: list[tuple[int, int]] = []
    if not isinstance(images, ImageProcessorItems):
        return sizes
    for index, image in enumerate(images.get_all()):
        if isinstance(image, Image) or (isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 3):
            size = images.get_image_size(index)
            sizes.append((size.height, size.width))
    return sizes


def without_ours(kwargs: Mapping[str, object]) -> dict[str, Any]:
    """Arguments of the model's own processor.

    Args:
        kwargs: `mm_processor_kwargs`.
    """
    return {key: value for key, value in kwargs.items() if not key.startswith(PREFIX)}
