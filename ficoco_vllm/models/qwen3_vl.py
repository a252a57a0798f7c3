"""Qwen3-VL, dense or a mixture of experts, with visual tokens reduced in the vision tower; replaces vLLM's classes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.model_executor.models.qwen3_vl_moe import (
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder.decoder import ReducingStep
from ficoco_vllm.hooks.position_embeddings import hook_position_embeddings
from ficoco_vllm.hooks.pruned_positions import hook_pruned_positions
from ficoco_vllm.models.qwen3_vl_processing import QwenInfo, QwenMoeInfo, QwenProcessor
from ficoco_vllm.models.reducing_model import ReducingModel, Requested
from ficoco_vllm.planning.resolution import Resolution
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import VisionPlan
from ficoco_vllm.processing import register
from ficoco_vllm.vision.mrope import CHANNELS, put_places, with_places, without_places
from ficoco_vllm.vision.qwen3_vl_tower import Merged, QwenTower
from ficoco_vllm.vision.tower import Observers, Tokens, Tower


class ReducingQwen(ReducingModel):
    """Mixin for the Qwen3-VL classes: units of 2 x 2 patches leave, with their deepstack features.

    Where the tower reduces, all embeddings carry the places of their tokens (`vision/mrope.py`), which vLLM hands to
    `recompute_mrope_positions`, as it does for its own pruning of videos.
    """

    visual: Any
    _process_image_input: Any
    _process_video_input: Any
    _parse_and_validate_multimodal_inputs: Any
    _get_deepstack_input_embeds: Any
    _clear_deepstack_input_embeds: Any
    deepstack_num_level: int

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        hf_config = vllm_config.model_config.hf_config
        if FicocoConfig.of(hf_config).method is not None and ServerPlan.served(hf_config).tower.active:
            # Before vLLM's class builds the decoder, whose table of rotations must hold the positions.
            hook_pruned_positions(vllm_config.model_config.multimodal_config)
        hook_position_embeddings()
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        reduction: ReducingStep | None = None,
        **kwargs: Any,
    ) -> Any:
        """See `ReducingModel`."""
        output = super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, reduction, **kwargs
        )
        if reduction is not None:
            assert inputs_embeds is not None
            self._clear_deepstack_input_embeds(len(inputs_embeds))  # vLLM's forward does it in other steps
        return output

    def deepstack(self, num_tokens: int) -> Sequence[Tensor]:
        """See `ReducingModel`."""
        features = self._get_deepstack_input_embeds(num_tokens)
        if features is None:
            return ()
        return [features[f"deepstack_input_embeds_{level}"] for level in range(self.deepstack_num_level)]

    def tower_of(self, grid: tuple[int, int]) -> Tower:
        """See `ReducingModel`."""
        return QwenTower(self.visual, grid)

    def project(self, units: Tensor) -> Tensor:
        """See `ReducingModel`; the tower has merged them."""
        return units

    def embed_units(self, units: Tensor) -> Tensor:
        """See `ReducingModel`; without deepstack features."""
        B, N, _ = units.shape
        merged: Tensor = self.visual.merger(units.reshape(B * N * self.visual.spatial_merge_unit, -1))
        return merged.view(B, N, -1)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings | None:
        """Embed the images and videos of a step, images of one budget and grid together.

        Args:
            **kwargs: vLLM's fields of a batch, and ours; see `ReducingModel.requested`.

        Returns:
            One tensor (num_tokens, hidden size of all levels) for each item, in order; where the tower reduces,
            followed by the places of its tokens.
        """
        requested = self.requested(kwargs)
        stock: Any = super()
        if self.planner is None:
            embeddings: MultiModalEmbeddings | None = stock.embed_multimodal(**kwargs)
            return embeddings
        given = self._parse_and_validate_multimodal_inputs(**kwargs)
        result: list[Tensor] = []
        for modality, items in given.items():
            if modality == "image" and items["type"] == "pixel_values" and requested is not None:
                result += self._embed_images(items, requested)
            else:
                process = self._process_image_input if modality == "image" else self._process_video_input
                result += [without_places(embedding) for embedding in process(items)]
        return result

    def _embed_images(self, items: Any, requested: Requested) -> list[Tensor]:
        """Embeddings of images, with the places of their tokens."""
        side = self.visual.spatial_merge_size
        thw, pixels = items["image_grid_thw"], items["pixel_values"]
        grids = [(rows // side, columns // side) for _, rows, columns in thw.tolist()]
        patches = pixels.split(thw.prod(-1).tolist())

        def stock(index: Sequence[int]) -> list[Tensor]:
            whole = type(items)(
                type="pixel_values",
                pixel_values=torch.cat([patches[i] for i in index]),
                image_grid_thw=thw[index],
            )
            return [without_places(embedding) for embedding in self._process_image_input(whole)]

        places = [Resolution.place(*grid) for grid in grids]
        return self.embed_tiles([[one] for one in patches], places, requested, stock)

    def _encode(
        self,
        pixels: Tensor,
        plan: VisionPlan,
        grid: tuple[int, int],
        observers: Observers | None,
        questions: Sequence[Tensor],
        crop: Crop | None = None,
        tower: Tower | None = None,
    ) -> Tokens:
        """See `ReducingModel`; tokens of the language model, with deepstack features and places."""
        tower = QwenTower(self.visual, grid)
        tokens = super()._encode(pixels, plan, grid, observers, questions, crop, tower)
        merged = tower.merged(tokens)
        unit = tower.unit_of(tokens.position)
        return Merged(
            torch.stack([with_places(*one, grid[1]) for one in zip(merged, unit, strict=True)]),
            tokens.size,
            tokens.position,
        )

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions of a prompt: those of the same prompt without reduction.

        Each token of a reduced image gets the image's first position, which `recompute_mrope_positions` then moves to
        the place of its unit.

        Args:
            input_tokens: (N,) of the prompt.
            mm_features: its images and videos.

        Returns:
            (3, N) int64, and what the position of a generated token adds to its index.
        """
        stock: Any = super()
        if self.planner is None:
            positions: tuple[Tensor, int] = stock.get_mrope_input_positions(input_tokens, mm_features)
            return positions
        side = self.visual.spatial_merge_size
        whole: list[int] = []
        # Index in the prompt without reduction of each token.
        chosen: list[int] = []
        features = []
        end = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place = feature.mm_position
            chosen += range(len(whole), len(whole) + place.offset - end)
            whole += input_tokens[end : place.offset]
            end = place.offset + place.length
            num_tokens = place.length
            if feature.modality == "image":
                num_tokens = int(cast(Any, feature.data)["image_grid_thw"].data.prod()) // side**2
            start = len(whole)
            features.append(replace(feature, mm_position=replace(place, offset=start, length=num_tokens)))
            if num_tokens == place.length:
                chosen += range(start, start + num_tokens)
                whole += input_tokens[place.offset : end]
            else:
                chosen += [start] * place.length
                whole += [self.config.image_token_id] * num_tokens
        chosen += range(len(whole), len(whole) + len(input_tokens) - end)
        whole += input_tokens[end:]
        of_whole, _ = stock.get_mrope_input_positions(whole, features)
        return of_whole[:, chosen], int(of_whole.max()) + 1 - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Remove the places from the embeddings of a step, and write them into the positions; see vLLM's class.

        Args:
            input_ids: (N,) of the prompt.
            multimodal_embeddings: embeddings of one request, for the tokens from `num_computed_tokens` on.
            mrope_positions: (3, N) of the prompt.
            num_computed_tokens: number of computed tokens of the prompt.

        Returns:
            The embeddings without places, positions (3, N), and what the position of a generated token adds to its
            index.
        """
        positions = mrope_positions
        if multimodal_embeddings:
            ids = torch.as_tensor(input_ids, device=positions.device)
            is_visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
            channels = torch.cat([embedding[:, -CHANNELS:] for embedding in multimodal_embeddings])
            with gpu_sync_allowed():
                index = is_visual[num_computed_tokens:].nonzero()[: len(channels), 0] + num_computed_tokens
            positions = put_places(positions, index, channels.to(positions.device))
        with gpu_sync_allowed():
            delta = int(positions.max()) + 1 - positions.shape[1]
        return [embedding[:, :-CHANNELS] for embedding in multimodal_embeddings], positions, delta


@register(
    QwenInfo,
    QwenProcessor,
    Qwen3VLProcessingInfo,
    Qwen3VLMultiModalProcessor,
    Qwen3VLDummyInputsBuilder,
)
class FicocoQwen3VL(ReducingQwen, Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, with reduction of the images whose budget is below their number of units."""


@register(
    QwenMoeInfo,
    QwenProcessor,
    Qwen3VLMoeProcessingInfo,
    Qwen3VLMultiModalProcessor,
    Qwen3VLDummyInputsBuilder,
)
class FicocoQwen3VLMoe(ReducingQwen, Qwen3VLMoeForConditionalGeneration):
    """vLLM's Qwen3-VL with mixtures of experts, reduced in the same way."""
