"""What the reduction must know of a CLIP tower, read off the model's configuration."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a CLIP tower as LLaVA uses it.

    Attributes:
        grid: rows and columns of patches.
        num_layers: layers of the checkpoint; the layer that starts a reduction is scaled by them.
        num_executed_layers: layers that run, up to the one whose output LLaVA takes.
        with_cls: whether [CLS] is handed to the language model too (select strategy "full").
    """

    grid: tuple[int, int]
    num_layers: int
    num_executed_layers: int
    with_cls: bool

    @property
    def num_patches(self) -> int:
        """Visual tokens before any reduction, [CLS] not counted."""
        return self.grid[0] * self.grid[1]

    @classmethod
    def from_hf_config(cls, hf_config: Any) -> "TowerShape":
        """Read a LLaVA configuration.

        Args:
            hf_config: transformers' LlavaConfig.

        Raises:
            ValueError: the tower is not a CLIP, or several feature layers are concatenated.
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
        return cls(
            grid=(side, side),
            num_layers=vision.num_hidden_layers,
            num_executed_layers=layer if layer >= 0 else vision.num_hidden_layers + layer + 1,
            with_cls=hf_config.vision_feature_select_strategy == "full",
        )
