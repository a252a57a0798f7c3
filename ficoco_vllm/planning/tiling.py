"""How LLaVA-NeXT cuts an image into tiles, and which patches of each show the image: host-side integers only."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch


class Crop(NamedTuple):
    """The rectangle of a tile's patches that show the image; the others are padding."""

    top: int
    left: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        """Patches in it."""
        return self.rows * self.columns


class Place(NamedTuple):
    """A tile of an image.

    Attributes:
        number: among the image's pixel values, where 0 is the base view: the whole image, scaled down.
        row: of tiles, -1 for the base view.
        column: of tiles, -1 for the base view.
        crop: patches that show the image.
    """

    number: int
    row: int
    column: int
    crop: Crop


@dataclass(frozen=True)
class Tiling:
    """The resolutions of a model.

    Attributes:
        pinpoints: height and width in pixels of each resolution that an image may be scaled to.
        tile_size: height and width of a tile in pixels.
        side: height and width of a tile in patches.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    side: int

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest image, its base view counted."""
        return 1 + max(
            height // self.tile_size * (width // self.tile_size) for height, width in self.pinpoints
        )

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """The tiles of an image, the base view first, then row by row; also those that show nothing but padding.

        Args:
            height: of the image in pixels.
            width: of the image in pixels.
        """
        return _places(self, height, width)

    def num_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image without reduction: patches that show it, and a newline behind each row of them.

        Args:
            height: of the image in pixels.
            width: of the image in pixels.
        """
        base, *tiles = self.places(height, width)
        newlines = sum(place.crop.rows for place in tiles if place.column == 0)
        return base.crop.num_patches + sum(place.crop.num_patches for place in tiles) + newlines


@lru_cache(maxsize=4096)
def _places(tiling: Tiling, height: int, width: int) -> tuple[Place, ...]:
    # Loaded where an image is cut: plans of other models do without it.
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    side = tiling.side
    rows, columns = get_anyres_image_grid_shape(
        (height, width), [list(pinpoint) for pinpoint in tiling.pinpoints], tiling.tile_size
    )
    # What vLLM crops the features with says how many rows and columns of patches are left, in the middle.
    canvas = torch.empty((1, rows * side, columns * side), device="meta")
    _, num_rows, num_columns = unpad_image(canvas, (height, width)).shape
    top, left = (rows * side - num_rows) // 2, (columns * side - num_columns) // 2
    bottom, right = top + num_rows, left + num_columns
    places = [Place(0, -1, -1, Crop(0, 0, side, side))]
    for row in range(rows):
        above, below = _within(top, bottom, row * side, side)
        for column in range(columns):
            before, behind = _within(left, right, column * side, side)
            crop = Crop(above, before, max(0, below - above), max(0, behind - before))
            places.append(Place(len(places), row, column, crop))
    return tuple(places)


def _within(start: int, stop: int, first: int, side: int) -> tuple[int, int]:
    """The part of a range that lies in a tile, counted from the tile's edge."""
    return max(0, start - first), min(side, stop - first)
