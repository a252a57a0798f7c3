"""Controls: no reduction, but the same budget met in another way, so that a reduction has something to beat."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Control:
    """A way to meet a budget without a reduction.

    Attributes:
        name: as users write it.
        title: as its authors write it.
        source: arXiv identifier.
        site: where it works, "image": before the vision tower.
        needs: the models that can serve it, for error texts.
    """

    name: str
    title: str
    source: str
    needs: str
    site: str = "image"


DOWNSCALE = Control(
    "downscale",
    "Downscaled image",
    "2510.07143",
    "a model with dynamic resolution, whose number of visual tokens follows the image's size (Qwen3-VL); a LLaVA "
    "scales every image, or every tile of it, to one size",
)

CONTROLS: Mapping[str, Control] = {DOWNSCALE.name: DOWNSCALE}
