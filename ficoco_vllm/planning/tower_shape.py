"""The sizes of a CLIP tower that a plan depends on, read from the model's configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.planning.tiling import Tiling
from ficoco_vllm.reduction.cost import ModelShape


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a CLIP tower as LLaVA uses it.

    Attributes:
        grid: rows and columns of patches.
        num_layers: layers of the checkpoint; the layer that starts a reduction is scaled by them.
        num_executed_layers: layers that run, up to the one whose output LLaVA takes.
        with_cls: whether the language model gets [CLS] too (select strategy "full").
        tiling: how an image is cut into tiles, each of which the tower sees alone (LLaVA-NeXT); None where the tower
            sees the whole image.
    """

    grid: tuple[int, int]
    num_layers: int
    num_executed_layers: int
    with_cls: bool
    tiling: Tiling | None = None

    @property
    def num_patches(self) -> int:
        """Visual tokens of an image, or of a tile of it, before any reduction, [CLS] not counted."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> "TowerShape":
        """Read a LLaVA configuration.

        Args:
            hf_config: transformers' LlavaConfig or LlavaNextConfig.

        Raises:
            ValueError: the tower is not a CLIP, several feature layers are concatenated, or the model cannot cut its
                images into tiles.
        """
        vision = hf_config.vision_config
        if vision.model_type != "clip_vision_model":
            raise ValueError(
                f"ficoco: vision_config.model_type = {vision.model_type!r} cannot be reduced; "
                "allowed: 'clip_vision_model' (the methods read the attention of a [CLS] token)"
            )
        layer = hf_config.vision_feature_layer
        if not isinstance(layer, int):
            raise ValueError(
                f"ficoco: vision_feature_layer = {layer!r} cannot be reduced; allowed: one layer (an integer)"
            )
        side = vision.image_size // vision.patch_size
        with_cls = hf_config.vision_feature_select_strategy == "full"
        tiling = None
        if hf_config.model_type == "llava_next":
            if with_cls:
                raise ValueError(
                    "ficoco: vision_feature_select_strategy = 'full' has no place for [CLS] among the tiles of "
                    "LLaVA-NeXT; allowed: 'default'"
                )
            pinpoints = tuple((height, width) for height, width in hf_config.image_grid_pinpoints)
            tiling = Tiling(pinpoints, vision.image_size, side)
        return cls(
            grid=(side, side),
            num_layers=vision.num_hidden_layers,
            num_executed_layers=layer if layer >= 0 else vision.num_hidden_layers + layer + 1,
            with_cls=with_cls,
            tiling=tiling,
        )

    @classmethod
    def from_model_shape(
        cls, shape: ModelShape, pinpoints: Sequence[tuple[int, int]] | None = None
    ) -> "TowerShape":
        """Read the sizes that the cost model has read from a config.json.

        Args:
            shape: of the model.
            pinpoints: of a model that cuts its images into tiles.
        """
        tower = shape.tower
        side = tower.image_size // tower.patch_size
        tiling = None if pinpoints is None else Tiling(tuple(pinpoints), tower.image_size, side)
        return cls((side, side), tower.num_layers, tower.num_executed, with_cls=False, tiling=tiling)
