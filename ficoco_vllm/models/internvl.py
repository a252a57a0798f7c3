"""InternVL with each tile's visual tokens reduced in the tower; replaces vLLM's class."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.model_executor.models.interfaces import MultiModalEmbeddings
from vllm.model_executor.models.interns1 import (
    InternS1DummyInputsBuilder,
    InternS1ForConditionalGeneration,
    InternS1MultiModalProcessor,
    InternS1ProcessingInfo,
)
from vllm.model_executor.models.interns1_vit import InternS1VisionLayer, InternS1VisionModel
from vllm.multimodal.processing import PromptUpdateDetails

from ficoco_vllm.models.reducing_model import ReducingModel
from ficoco_vllm.planning.families.internvl import SIDE_OF_UNIT, Mosaic
from ficoco_vllm.processing import ReducingInfo, ReducingProcessor, register
from ficoco_vllm.vision.cpu_attention import is_faster
from ficoco_vllm.vision.cpu_layer import in_parts
from ficoco_vllm.vision.staging import take_items
from ficoco_vllm.vision.tower import Tower
from ficoco_vllm.vision.units import by_units


@dataclass(frozen=True)
class InternLayer:
    """One encoder layer (`EncoderLayer`). Its attention is whole on every rank.

    Attributes:
        layer: vLLM's.
    """

    layer: InternS1VisionLayer
    all_reduce: None = None

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.attention.scale)

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        return int(self.layer.attention.num_heads)

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`; in vLLM's own code, unless ours is faster."""
        if is_faster(hidden):
            return in_parts(self, hidden)
        output: Tensor = self.layer(hidden)
        return output

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`."""
        attention, normed = self.layer.attention, self.layer.layernorm_before(hidden)
        query, key = attention.q_proj(normed), attention.k_proj(normed)
        if attention.qk_normalization:
            query, key = attention.q_norm(query), attention.k_norm(key)
        B, N, _ = normed.shape
        return cast(
            tuple[Tensor, Tensor, Tensor],
            tuple(
                part.view(B, N, attention.num_heads, attention.head_dim).transpose(1, 2)
                for part in (query, key, attention.v_proj(normed))
            ),
        )

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        projected: Tensor = self.layer.attention.projection_layer(mixed) * self.layer.lambda_1
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer.mlp(self.layer.layernorm_after(hidden)) * self.layer.lambda_2
        return output


class InternTower(Tower):
    """InternViT (`Tower`), its patches unit by unit."""

    unit = SIDE_OF_UNIT**2

    def __init__(self, tower: InternS1VisionModel, grid: tuple[int, int]) -> None:
        """Share the modules of a tower.

        Args:
            tower: vLLM's.
            grid: rows and columns of units.
        """
        self.tower, self.grid = tower, grid
        self.layers = [InternLayer(layer) for layer in tower.encoder.layer]

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        hidden, _ = self.tower.embeddings(pixels)
        return in_units(hidden, self.grid)

    def finish(self, hidden: Tensor) -> Tensor:
        """See `Tower`."""
        output: Tensor = self.tower.layernorm(hidden)
        return output


class InternVLProcessingInfo(ReducingInfo, InternS1ProcessingInfo):
    """InternVL's processing info, with the number of tokens that an image keeps."""


class InternVLProcessor(ReducingProcessor, InternS1MultiModalProcessor):
    """InternVL's processor, with a budget for each request."""

    info: InternVLProcessingInfo

    def num_images(self, processed: BatchFeature) -> int:
        """See `ReducingProcessor`."""
        return len(processed.get("image_num_patches", ()))

    def placeholder(self, num_tokens: int) -> PromptUpdateDetails:
        """See `ReducingProcessor`."""
        processor = self.info.get_hf_processor()
        image = processor.image_token_id
        tokens = [processor.start_image_token_id, *[image] * num_tokens, processor.end_image_token_id]
        return PromptUpdateDetails.select_token_id(tokens, image)


class ReducingInternVL(ReducingModel):
    """Mixin for vLLM's classes of InternVL, whose batches hold the tiles of all images one after the other."""

    def embed_flat(
        self, fields: dict[str, Any], pixels_field: str, stock: Callable[..., MultiModalEmbeddings]
    ) -> MultiModalEmbeddings:
        """Embed the images or the videos of a step, tiles of one budget together.

        Args:
            fields: vLLM's of a batch of n images, and ours; see `ReducingModel.requested`.
            pixels_field: name of the tiles among them.
            stock: vLLM's own `embed_multimodal`.

        Returns:
            One tensor (num_tokens, hidden size) for each image, in order.
        """
        requested, pixels = self.requested(fields), fields.get(pixels_field)
        if requested is None or pixels is None:
            return stock(**fields)
        assert self.planner is not None
        assert isinstance(self.planner.shape.tiling, Mosaic)
        num_tiles: Tensor = fields["image_num_patches"]
        tiles = torch.split(pixels, num_tiles.tolist())

        def whole(index: list[int]) -> Sequence[Tensor]:
            some = {
                pixels_field: torch.cat([tiles[image] for image in index]),
                "image_num_patches": take_items(num_tiles, index),
            }
            embeddings: Sequence[Tensor] = stock(**{**fields, **some})
            return embeddings

        places = [self.planner.shape.tiling.places_of(count) for count in num_tiles.tolist()]
        return self.embed_tiles(tiles, places, requested, whole)


def in_units(hidden: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches unit by unit, those of a unit in raster order, as the pixel shuffle joins them; [CLS] stays first.

    Args:
        hidden: (B, 1 + N, D), the patches in raster order.
        grid: rows and columns of units.
    """
    return torch.cat([hidden[:, :1], by_units(hidden[:, 1:], grid, SIDE_OF_UNIT)], dim=1)


@register(
    InternVLProcessingInfo,
    InternVLProcessor,
    InternS1ProcessingInfo,
    InternS1MultiModalProcessor,
    InternS1DummyInputsBuilder,
)
class FicocoInternVL(ReducingInternVL, InternS1ForConditionalGeneration):
    """vLLM's InternVL, with reduction of the images whose budget is below their number of tokens. Videos stay whole."""

    vision_tower: Any

    def tower_of(self, grid: tuple[int, int]) -> Tower:
        """See `ReducingModel`."""
        return InternTower(self.vision_tower, grid)

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Embed the images or the videos of a step; see `embed_flat`.

        Args:
            **kwargs: vLLM's fields and ours.
        """
        return self.embed_flat(kwargs, "pixel_values", super().embed_multimodal)
