"""Tiles of a LLaVA-NeXT image, and the patches of each that show the image: integers, no pixels."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple


class Crop(NamedTuple):
    """The rectangle of a tile's patches that show the image; the others are padding."""

    top: int
    left: int
    rows: int
    columns: int

    @property
    def num_patches(self) -> int:
        """Patches in the rectangle."""
        return self.rows * self.columns


class Place(NamedTuple):
    """A tile's place in its image.

    Attributes:
        number: index among the image's pixel values, where 0 is the base view: the whole image, scaled down.
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
        """Tiles of the largest image, including its base view."""
        return 1 + max(
            height // self.tile_size * (width // self.tile_size) for height, width in self.pinpoints
        )

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """The tiles of an image, the base view first, then row by row, including those that are all padding.

        Args:
            height: of the image in pixels.
            width: of the image in pixels.
        """
        return _places(self, height, width)

    def num_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image without reduction: patches that show it, and a newline after each row of them.

        Args:
            height: of the image in pixels.
            width: of the image in pixels.
        """
        base, *tiles = self.places(height, width)
        newlines = sum(place.crop.rows for place in tiles if place.column == 0)
        return base.crop.num_patches + sum(place.crop.num_patches for place in tiles) + newlines


def best_resolution(height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The resolution that preserves most pixels of an image and, of several, has the fewest pixels of padding.

    Source: transformers, `select_best_resolution`, whose floating-point arithmetic this repeats.
    """

    def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / width, pinpoint[0] / height)
        preserved = min(int(width * scale) * int(height * scale), width * height)
        return preserved, -pinpoint[0] * pinpoint[1]

    return max(pinpoints, key=merit)


def unpadded(height: int, width: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of patches, in the middle of a canvas, that show an image.

    Args:
        height: of the image in pixels.
        width: of the image in pixels.
        rows: of patches of the canvas.
        columns: of patches of the canvas.

    Source: transformers, `unpad_image`, whose floating-point arithmetic this repeats.
    """
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return max(0, rows - 2 * ((rows - shown) // 2)), columns
    shown = int(round(width * (rows / height), 7))
    return rows, max(0, columns - 2 * ((columns - shown) // 2))


@lru_cache(maxsize=4096)
def _places(tiling: Tiling, height: int, width: int) -> tuple[Place, ...]:
    side = tiling.side
    rows, columns = (
        length // tiling.tile_size for length in best_resolution(height, width, tiling.pinpoints)
    )
    num_rows, num_columns = unpadded(height, width, rows * side, columns * side)
    top, left = (rows * side - num_rows) // 2, (columns * side - num_columns) // 2
    bottom, right = top + num_rows, left + num_columns
    places = [Place(0, -1, -1, Crop(0, 0, side, side))]
    for row in range(rows):
        first, last = _within(top, bottom, row * side, side)
        for column in range(columns):
            start, stop = _within(left, right, column * side, side)
            crop = Crop(first, start, max(0, last - first), max(0, stop - start))
            places.append(Place(len(places), row, column, crop))
    return tuple(places)


def _within(start: int, stop: int, first: int, side: int) -> tuple[int, int]:
    """The part of a range that lies in a tile, counted from the tile's edge."""
    return max(0, start - first), min(side, stop - first)
