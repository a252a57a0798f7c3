"""LLaVA with visual tokens reduced in the vision tower or the decoder; replaces vLLM's class."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import CLIPVisionConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext

from ficoco_vllm.models.reducing_model import ReducingModel, Requested
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor
from ficoco_vllm.vision.graphs import TowerGraphs
from ficoco_vllm.vision.tower import Tower
from ficoco_vllm.vision.vllm_tower import VllmTower


class FicocoProcessingInfo(ReducingInfo, LlavaProcessingInfo):
    """LLaVA's processing info, with the number of tokens that an image keeps."""


class FicocoMultiModalProcessor(ReducingProcessor, LlavaMultiModalProcessor):
    """LLaVA's processor, with a budget for each request."""

    info: FicocoProcessingInfo


def _build_info(ctx: InputProcessingContext) -> BaseLlavaProcessingInfo:
    """Our processing info for towers that can be reduced, vLLM's for others."""
    if isinstance(ctx.get_hf_config().vision_config, CLIPVisionConfig):
        return FicocoProcessingInfo(ctx)
    return _build_llava_or_pixtral_hf_info(ctx)


def _build_processor(
    info: BaseLlavaProcessingInfo, dummy_inputs: LlavaDummyInputsBuilder
) -> BaseMultiModalProcessor:
    if isinstance(info, FicocoProcessingInfo):
        return FicocoMultiModalProcessor(info, dummy_inputs)
    return _build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    _build_processor, info=_build_info, dummy_inputs=LlavaDummyInputsBuilder
)
class FicocoLlava(TowerGraphs, ReducingModel, LlavaForConditionalGeneration):
    """vLLM's LLaVA, with reduction of the images whose budget is below the number of patches."""

    vision_tower: Any
    _image_pixels_to_features: Callable[[Any, Tensor], Tensor]

    def tower_of(self, grid: tuple[int, int]) -> Tower:
        """See `ReducingModel`."""
        return VllmTower(self.vision_tower.vision_model)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images of a step, those of one budget together.

        Args:
            **kwargs: vLLM's fields of a batch of n images, and ours; see `ReducingModel.requested`.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        requested, pixels = self.requested(kwargs), kwargs.get("pixel_values")
        if requested is None or not isinstance(pixels, Tensor):
            return super().embed_multimodal(**kwargs)
        return self.embed_whole(pixels, requested, self._stock)

    def embed_budget(self, pixels: Tensor, budget: Budget) -> Tensor:
        """See `TowerGraphs`."""
        if self.planner is None:
            return self.project(self._stock(pixels))
        return self._embed(pixels, budget, Requested([], {}), (), self._stock)

    def _stock(self, pixels: Tensor) -> Tensor:
        """Features of images from which nothing leaves, in vLLM's own code."""
        return self._image_pixels_to_features(self.vision_tower, pixels)
