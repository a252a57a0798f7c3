"""LLaVA-NeXT with each tile's visual tokens reduced in the tower, or the image's in the decoder."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import LlavaDummyInputsBuilder
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)

from ficoco_vllm.models.reducing_model import ReducingModel
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor, register
from ficoco_vllm.vision.staging import take_items
from ficoco_vllm.vision.tower import Tower
from ficoco_vllm.vision.vllm_tower import VllmTower


class FicocoNextProcessingInfo(ReducingInfo, LlavaNextProcessingInfo):
    """LLaVA-NeXT's processing info, with the number of tokens that an image keeps."""


class FicocoNextProcessor(ReducingProcessor, LlavaNextMultiModalProcessor[FicocoNextProcessingInfo]):
    """LLaVA-NeXT's processor, with a budget for each request."""

    info: FicocoNextProcessingInfo


@register(
    FicocoNextProcessingInfo,
    FicocoNextProcessor,
    LlavaNextProcessingInfo,
    LlavaNextMultiModalProcessor,
    LlavaDummyInputsBuilder,
)
class FicocoLlavaNext(ReducingModel, LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, with reduction of the images whose budget is below their number of tokens."""

    image_newline: Any
    vision_tower: Any
    _image_pixels_to_features: Callable[[Any, Tensor], Tensor]

    @property
    def newline(self) -> Tensor:
        """See `ReducingModel`."""
        newline: Tensor = self.image_newline
        return newline

    def tower_of(self, grid: tuple[int, int]) -> Tower:
        """See `ReducingModel`."""
        return VllmTower(self.vision_tower.vision_model)

    def stock_units(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `ReducingModel`; in vLLM's own code."""
        return self._image_pixels_to_features(self.vision_tower, pixels)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images of a step, tiles of one budget and crop together.

        Args:
            **kwargs: vLLM's fields of a batch of n images, and ours; see `ReducingModel.requested`.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        requested, pixels = self.requested(kwargs), kwargs.get("pixel_values")
        stock = super().embed_multimodal
        if requested is None or pixels is None:
            return stock(**kwargs)
        assert self.planner is not None
        assert self.planner.shape.tiling is not None
        sizes: Any = kwargs["image_sizes"]
        places = [self.planner.shape.tiling.places(int(height), int(width)) for height, width in sizes]
        return self.embed_tiles(
            pixels,
            places,
            requested,
            lambda index: stock(pixel_values=take_items(pixels, index), image_sizes=take_items(sizes, index)),
        )
