"""LLaVA with visual tokens reduced in the vision tower or the decoder; replaces vLLM's class."""

from collections import defaultdict

import torch
from torch import Tensor
from transformers import CLIPVisionConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.llava import (
    BaseLlavaProcessingInfo,
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    _build_llava_or_pixtral_hf_info,
    _build_llava_or_pixtral_hf_processor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.processing import BaseMultiModalProcessor, InputProcessingContext

from ficoco_vllm.models.reduced_llava import ReducingLlava
from ficoco_vllm.planning.tower import Budget
from ficoco_vllm.processing import FicocoMultiModalProcessor, FicocoProcessingInfo
from ficoco_vllm.request_fields import KEEP, METHOD, TRACE
from ficoco_vllm.vision.graphs import TowerGraphs


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
class FicocoLlava(TowerGraphs, ReducingLlava, LlavaForConditionalGeneration):
    """vLLM's LLaVA, with reduction of the images whose budget is below the number of patches."""

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images of a step, those of one budget together.

        Args:
            **kwargs: vLLM's fields of a batch of n images, with `ficoco_keep` and `ficoco_method` (n,) on the host,
                and `ficoco_trace` (n,) where they are traced.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        keep, method, trace = (kwargs.pop(name, None) for name in (KEEP, METHOD, TRACE))
        pixels = kwargs.get("pixel_values")
        if self.planner is None or not isinstance(keep, Tensor) or not isinstance(pixels, Tensor):
            return super().embed_multimodal(**kwargs)
        assert isinstance(method, Tensor)
        groups: dict[Budget, list[int]] = defaultdict(list)
        for index, (number, count) in enumerate(zip(method.tolist(), keep.tolist(), strict=True)):
            groups[Budget(self.planner.methods[number], count)].append(index)
        traced = dict(enumerate(trace.tolist())) if isinstance(trace, Tensor) else {}
        embeddings: list[Tensor] = [pixels.new_empty(0)] * len(pixels)
        for budget, members in groups.items():
            for start in range(0, len(members), self.max_images):
                chunk = members[start : start + self.max_images]
                batch = (
                    pixels if len(chunk) == len(pixels) else pixels[torch.tensor(chunk, device=pixels.device)]
                )
                here = {place: traced[index] for place, index in enumerate(chunk) if index in traced}
                for index, embedding in zip(chunk, self._embed(batch, budget, here), strict=True):
                    embeddings[index] = embedding
        return embeddings

    def _embed(self, pixels: Tensor, budget: Budget, traced: dict[int, int]) -> Tensor:
        """Features of images of one budget, projected.

        Args:
            pixels: (B, 3, height, width).
            budget: method and number of patch tokens.
            traced: maps index in the batch to trace id, for the images that are traced.

        Returns:
            (B, num_tokens, hidden size of the language model).
        """
        if self.planner is None or not self.planner.reduces(budget):
            features = self._image_pixels_to_features(self.vision_tower, pixels)
        else:
            features = self._encode(pixels, self.planner.plan(budget), self._observers(traced)).hidden
            if not self.planner.shape.with_cls:
                features = features[:, 1:]
        projected: Tensor = self.multi_modal_projector(features)
        return projected
