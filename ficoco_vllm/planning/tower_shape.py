"""The sizes of a vision tower that a plan depends on."""

from dataclasses import dataclass
from typing import Any

from ficoco_vllm.planning.tiling import Tiling
from ficoco_vllm.reduction.cost import ModelShape

# Attribute of transformers' configuration that holds the image processor's settings.
IMAGES = "ficoco_images"


def image_settings(hf_config: Any) -> dict[str, Any]:
    """Settings of the image processor, as `Family.image_settings` has read them.

    Args:
        hf_config: transformers' configuration of a model whose family reads them.
    """
    settings: dict[str, Any] = getattr(hf_config, IMAGES)
    return settings


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a vision tower as its model uses it.

    A unit is the group of patches that becomes one token of the language model.

    Attributes:
        grid: rows and columns of units, of the largest image where the grid follows the image's size.
        num_layers: layers of the checkpoint; the layer that starts a reduction is scaled by them.
        num_executed_layers: layers that run, up to the one whose output the model takes.
        with_cls: whether the language model gets [CLS] too (LLaVA's select strategy "full").
        tiling: how an image becomes tiles, each of which the tower sees alone; None where the tower sees every image
            whole, on one grid.
        unit: patches of a unit: 1 in LLaVA, 4 where 2 x 2 patches become one token.
        num_deepstack: levels of the tower whose features the language model adds to the outputs of its first layers,
            one for each.
    """

    grid: tuple[int, int]
    num_layers: int
    num_executed_layers: int
    with_cls: bool
    tiling: Tiling | None = None
    unit: int = 1
    num_deepstack: int = 0

    @property
    def num_units(self) -> int:
        """Visual tokens of an image, or of a tile of it, before any reduction, [CLS] not counted."""
        return self.grid[0] * self.grid[1]

    @property
    def dynamic(self) -> bool:
        """Whether the number of units follows the image's size."""
        return self.tiling is not None and self.tiling.dynamic

    @classmethod
    def from_model_shape(cls, shape: ModelShape) -> "TowerShape":
        """Read the sizes of a LLaVA-1.5 that the cost model has read from a config.json.

        Args:
            shape: sizes of the model.
        """
        tower = shape.tower
        side = tower.image_size // tower.patch_size
        return cls((side, side), tower.num_layers, tower.num_executed, with_cls=False)
