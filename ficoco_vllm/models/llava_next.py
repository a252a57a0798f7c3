"""LLaVA-NeXT with each tile's visual tokens reduced in the tower, or the image's in the decoder."""

from collections import defaultdict
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
from ficoco_vllm.planning.tiles import Layout, Tile
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.processing import FicocoNextProcessingInfo, FicocoNextProcessor, reducible
from ficoco_vllm.request_fields import KEEP, METHOD, TRACE
from ficoco_vllm.vision.packing import Kept, pack
from ficoco_vllm.vision.tower import Observers, cropped

# Tiles of equal budget and crop, which run together: index of the image, index of the tile in its layout, tile.
_Jobs = list[tuple[int, int, Tile]]


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
        """Run all tiles of the images that are reduced.

        Args:
            pixels: (n, tiles, 3, height, width), or as many tensors, of different numbers of tiles.
            layouts: of the images.
            budgets: of the images.
            traced: image to trace id, for the images that are traced.

        Returns:
            Image to the kept tokens of each tile of its layout.
        """
        groups: dict[tuple[str | None, int, Crop], _Jobs] = defaultdict(list)
        for image, (layout, budget) in enumerate(zip(layouts, budgets, strict=True)):
            for number, tile in enumerate(layout.tiles if layout.reduces else ()):
                groups[budget.method, tile.keep, tile.place.crop].append((image, number, tile))
        kept: dict[tuple[int, int], Kept] = {}
        for (method, count, _), jobs in groups.items():
            for start in range(0, len(jobs), self.max_images):
                chunk = jobs[start : start + self.max_images]
                batch = torch.stack([pixels[image][tile.place.number] for image, _, tile in chunk])
                observers = self._observers(
                    {place: traced[image] for place, (image, _, _) in enumerate(chunk) if image in traced},
                    {place: tile.place.number for place, (_, _, tile) in enumerate(chunk)},
                )
                tokens, position = self._run(batch, Budget(method, count), chunk[0][2], observers)
                for (image, number, _), *one in zip(chunk, tokens, position, strict=True):
                    kept[image, number] = Kept(*one)
        return {
            image: [kept[image, number] for number in range(len(layout.tiles))]
            for image, layout in enumerate(layouts)
            if layout.reduces
        }

    def _run(
        self, pixels: Tensor, budget: Budget, tile: Tile, observers: Observers | None
    ) -> tuple[Tensor, Tensor]:
        """Run tiles of one budget and one crop.

        Args:
            pixels: (B, 3, height, width).
            budget: of the tile.
            tile: one of them.
            observers: the observer of each reduction, if a tile is traced.

        Returns:
            Projected tokens (B, keep, hidden size of the language model) and their positions (B, keep) in the crop.
        """
        assert self.planner is not None
        crop, grid = tile.place.crop, self.planner.shape.grid
        plan = self.planner.tile_plan(budget, tile)
        if plan is None:
            features = cropped(self._image_pixels_to_features(self.vision_tower, pixels), grid, crop)
            position = torch.arange(crop.num_patches, device=features.device).expand(len(pixels), -1)
        else:
            padded = (crop.rows, crop.columns) != grid
            tokens = self._encode(pixels, plan, observers, crop if padded else None)
            features, position = tokens.hidden[:, 1:], tokens.position
        return self.multi_modal_projector(features), position


def _take(values: Any, index: list[int]) -> Any:
    """Items of a batch, which is a tensor or a list."""
    return (
        values[torch.tensor(index, device=values.device)]
        if isinstance(values, Tensor)
        else [values[i] for i in index]
    )
