"""LLaVA-NeXT with each tile's visual tokens reduced in the tower, or the image's in the decoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext

from ficoco_vllm.models.reduced_llava import ReducingLlava
from ficoco_vllm.planning.tiles import Layout
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import Budget, VisionPlan
from ficoco_vllm.processing import FicocoNextProcessingInfo, FicocoNextProcessor, reducible
from ficoco_vllm.request_fields import KEEP, METHOD, TRACE
from ficoco_vllm.vision.packing import Kept, pack
from ficoco_vllm.vision.tiles import keep_tiles
from ficoco_vllm.vision.tower import Tokens


def _build_info(ctx: InputProcessingContext) -> LlavaNextProcessingInfo:
    """Our processing info for models that can be reduced, vLLM's for others (other towers, several feature layers)."""
    return FicocoNextProcessingInfo(ctx) if reducible(ctx.get_hf_config()) else LlavaNextProcessingInfo(ctx)


def _build_processor(
    info: LlavaNextProcessingInfo, dummy_inputs: LlavaDummyInputsBuilder, **kwargs: Any
) -> BaseMultiModalProcessor:
    if isinstance(info, FicocoNextProcessingInfo):
        return FicocoNextProcessor(info, dummy_inputs, **kwargs)
    return LlavaNextMultiModalProcessor(info, dummy_inputs, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_processor, info=_build_info, dummy_inputs=LlavaDummyInputsBuilder
)
class FicocoLlavaNext(ReducingLlava, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, with reduction of the images whose budget is below their number of tokens."""

    image_newline: Any

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images of a step, tiles of one budget and crop together.

        Args:
            **kwargs: vLLM's fields of a batch of n images, with `ficoco_keep` and `ficoco_method` (n,) on the host,
                and `ficoco_trace` (n,) where they are traced.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        keep, method, trace = (kwargs.pop(name, None) for name in (KEEP, METHOD, TRACE))
        pixels: Any = kwargs.get("pixel_values")
        if self.planner is None or not isinstance(keep, Tensor) or pixels is None:
            return super().embed_multimodal(**kwargs)
        assert isinstance(method, Tensor)
        sizes: Any = kwargs["image_sizes"]
        budgets = [
            Budget(self.planner.methods[number], count)
            for number, count in zip(method.tolist(), keep.tolist(), strict=True)
        ]
        layouts = [
            self.planner.layout(budget, int(height), int(width))
            for (height, width), budget in zip(sizes, budgets, strict=True)
        ]
        whole = [index for index, layout in enumerate(layouts) if not layout.reduces]
        if len(whole) == len(layouts):
            return super().embed_multimodal(**kwargs)
        embeddings: list[Tensor] = [self.image_newline.new_empty(0)] * len(layouts)
        if whole:
            of_whole = super().embed_multimodal(
                pixel_values=_take(pixels, whole), image_sizes=_take(sizes, whole)
            )
            for index, embedding in zip(whole, of_whole, strict=True):
                embeddings[index] = embedding
        traced = dict(enumerate(trace.tolist())) if isinstance(trace, Tensor) else {}
        kept = self._keep(pixels, layouts, budgets, traced)
        for index, layout in enumerate(layouts):
            if layout.reduces:
                embeddings[index] = pack(layout, kept[index], self.image_newline, self.planner.shape.grid[0])
        return embeddings

    def _keep(
        self, pixels: Any, layouts: Sequence[Layout], budgets: Sequence[Budget], traced: dict[int, int]
    ) -> dict[int, list[Kept]]:
        """Run all tiles of the images that are reduced; see `keep_tiles`.

        Args:
            pixels: see `keep_tiles`.
            layouts: of the images.
            budgets: of the images.
            traced: image to trace id, for the images that are traced.
        """
        assert self.planner is not None

        def encode(
            batch: Tensor, plan: VisionPlan, crop: Crop | None, tiles: Sequence[tuple[int, int]]
        ) -> Tokens:
            observers = self._observers(
                {place: traced[image] for place, (image, _) in enumerate(tiles) if image in traced},
                {place: number for place, (_, number) in enumerate(tiles)},
            )
            return self._encode(batch, plan, observers, crop)

        return keep_tiles(
            pixels,
            layouts,
            budgets,
            self.planner,
            most=self.max_images,
            whole=lambda batch: self._image_pixels_to_features(self.vision_tower, batch),
            encode=encode,
            project=self.multi_modal_projector,
        )


def _take(values: Any, index: list[int]) -> Any:
    """Items of a batch, which is a tensor or a list."""
    return (
        values[torch.tensor(index, device=values.device)]
        if isinstance(values, Tensor)
        else [values[i] for i in index]
    )
