"""Processing of Qwen3-VL's images: a budget for each request, and images that are shrunk in place of a reduction."""

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.model_executor.models.qwen3_vl import Qwen3VLMultiModalProcessor, Qwen3VLProcessingInfo
from vllm.model_executor.models.qwen3_vl_moe import Qwen3VLMoeProcessingInfo
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems
from vllm.multimodal.processing.context import TimingContext
from vllm.multimodal.processing.inputs import ProcessorInputs

from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor, without_ours
from ficoco_vllm.reduction.control import DOWNSCALE
from ficoco_vllm.request_fields import BUDGET, KEEP, SIZES

# Positions in vLLM's table of rotations where it prunes, as a multiple of the model's own.
KNOWN_POSITIONS = 4


class QwenInfo(ReducingInfo, Qwen3VLProcessingInfo):
    """Qwen3-VL's processing info, with the number of tokens that an image keeps."""

    def _merge_and_resolve_mm_processor_kwargs(self, mm_kwargs: Mapping[str, object]) -> dict[str, Any]:
        return without_ours(super()._merge_and_resolve_mm_processor_kwargs(without_ours(mm_kwargs)))


class QwenMoeInfo(QwenInfo, Qwen3VLMoeProcessingInfo):
    """Processing info of the mixtures of experts, with the same counts."""


class QwenProcessor(ReducingProcessor, Qwen3VLMultiModalProcessor):
    """Qwen3-VL's processor, with a budget for each request."""

    info: QwenInfo

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """See `ReducingProcessor`.

        Args:
            inputs: see vLLM.
            timing_ctx: see vLLM.

        Raises:
            VLLMValidationError: also where the prompt may have positions beyond those that the decoder knows. An image
                takes as many as its longer side has units, however few tokens stay.
        """
        result: Any = super().apply(inputs, timing_ctx)
        if BUDGET in result and self.info.planner.active:
            beyond = sum(self._positions_without_token(result[BUDGET], *size) for size in result[SIZES])
            known = KNOWN_POSITIONS * self.info.get_hf_config().get_text_config().max_position_embeddings
            if beyond and self.info.ctx.model_config.max_model_len + beyond > known:
                raise VLLMValidationError(
                    f"{KEEP} = {result[BUDGET].keep} is not allowed for these images, whose sides take {beyond} "
                    "positions more than tokens stay; allowed: fewer images or a larger budget",
                    parameter=KEEP,
                )
        return cast(MultiModalInput, result)

    def _positions_without_token(self, budget: Budget, height: int, width: int) -> int:
        layout = self.info.planner.layout(budget, height, width)
        rows, columns = cast(Any, self.info.planner.shape.tiling).grid(height, width)
        return max(0, max(rows, columns) - layout.num_tokens) if layout.reduces else 0

    def num_images(self, processed: BatchFeature) -> int:
        """See `ReducingProcessor`."""
        return len(processed.get("image_grid_thw", ())) if "pixel_values" in processed else 0

    def _apply_hf_processor_main(
        self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        budget, images = self._admitted(hf_kwargs), mm_items.get("image")
        if budget.method == DOWNSCALE.name and isinstance(images, ImageProcessorItems):
            shrunk = ImageProcessorItems([self._shrink(image, budget) for image in images.get_all()])
            mm_items = MultiModalDataItems({**mm_items, "image": shrunk})
            # They have whole units, so the model's own processor need not scale them.
            scoped = {**cast(Any, hf_kwargs.get("images_kwargs") or {}), "do_resize": False}
            hf_kwargs = {**hf_kwargs, "images_kwargs": scoped}
        return super()._apply_hf_processor_main(mm_items, hf_kwargs)

    def _shrink(self, image: Any, budget: Budget) -> Tensor:
        """Scale an image as the model's own processor does, but to the budget: (3, height, width)."""
        processor = self.info.get_hf_processor().image_processor
        pixels = processor.process_image(image, do_convert_rgb=True)
        shape = self.info.planner.shape
        (tile,) = self.info.planner.layout(budget, *pixels.shape[-2:]).tiles
        unit_size = cast(Any, shape.tiling).unit_size
        size = SizeDict(height=tile.place.crop.rows * unit_size, width=tile.place.crop.columns * unit_size)
        scaled: Tensor = TorchvisionBackend.resize(
            processor, pixels[None], size=size, resample=processor.resample
        )
        return scaled[0]
