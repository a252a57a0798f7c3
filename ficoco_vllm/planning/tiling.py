"""Tiles of an image, and the units of each that show the image: integers, no pixels."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

# Left, top, width and height as shares of an image's width and height.
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Crop(NamedTuple):
    """The rectangle of a tile's units that show the image; the others are padding."""

    top: int
    left: int
    rows: int
    columns: int

    @property
    def num_units(self) -> int:
        """Units in the rectangle."""
        return self.rows * self.columns


class Place(NamedTuple):
    """A tile's place in its image.

    Attributes:
        number: index among the image's pixel values.
        row: row of tiles, -1 for a view of the whole image.
        column: column of tiles, -1 for a view of the whole image.
        crop: units that show the image.
    """

    number: int
    row: int
    column: int
    crop: Crop


class Tiling(ABC):
    """Division of an image into tiles, each of which the tower sees alone. A subclass is a frozen dataclass.

    An image whose grid follows its size (dynamic resolution) is one tile: its crop is that grid.

    Attributes:
        pads: whether tiles have a fixed grid, in which the crop is what shows the image. If not, the crop is the
            tile's own grid.
        dynamic: whether the number of units follows the image's size, so that a smaller image has fewer.
        ends_rows: whether the model puts a newline after each row of units, and we put one after each row of tiles.
    """

    pads: bool = False
    dynamic: bool = False
    ends_rows: bool = False

    @property
    @abstractmethod
    def most_tiles(self) -> int:
        """Tiles of the largest image."""

    @property
    @abstractmethod
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Height and width in pixels of images that cover every number of tiles, the largest image among them."""

    @property
    def largest(self) -> tuple[int, int]:
        """Height and width in pixels of an image with the most tokens."""
        return max(self.sizes, key=lambda size: self.num_tokens(*size))

    @abstractmethod
    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """The tiles of an image in the order of its pixel values, including those that are all padding.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.
        """

    @abstractmethod
    def box(self, place: Place, height: int, width: int) -> Box:
        """The part of an image that a tile's crop shows.

        Args:
            place: place of the tile.
            height: height of the image in pixels.
            width: width of the image in pixels.
        """

    def count(self, places: Sequence[Place]) -> int:
        """Visual tokens of an image without reduction.

        Args:
            places: places of its tiles.
        """
        return sum(place.crop.num_units for place in places)

    def num_tokens(self, height: int, width: int) -> int:
        """Visual tokens of an image without reduction.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.
        """
        return self.count(self.places(height, width))


@dataclass(frozen=True)
class AnyRes(Tiling):
    """The tiles of LLaVA-NeXT: the base view (the whole image, scaled down), then the rows of tiles, padded.

    Attributes:
        pinpoints: height and width in pixels of each resolution that an image may be scaled to.
        tile_size: height and width of a tile in pixels.
        side: height and width of a tile in patches.
    """

    pinpoints: tuple[tuple[int, int], ...]
    tile_size: int
    side: int
    pads = True
    ends_rows = True

    @property
    def most_tiles(self) -> int:
        """Tiles of the largest image, including its base view."""
        return 1 + max(
            height // self.tile_size * (width // self.tile_size) for height, width in self.pinpoints
        )

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Tiling`."""
        return self.pinpoints

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """See `Tiling`; the base view comes first."""
        return _places(self, height, width)

    def count(self, places: Sequence[Place]) -> int:
        """See `Tiling`; patches that show the image, and a newline after each row of them."""
        return super().count(places) + sum(place.crop.rows for place in places if place.column == 0)

    def box(self, place: Place, height: int, width: int) -> Box:
        """See `Tiling`.

        Source: transformers, `LlavaNextImageProcessor`: the image is scaled to fit a resolution and padded equally.
        """
        if place.row < 0:
            return WHOLE
        rows, columns = best_resolution(height, width, self.pinpoints)
        scale = min(columns / width, rows / height)
        shown_height, shown_width = (
            min(math.ceil(height * scale), rows),
            min(math.ceil(width * scale), columns),
        )
        top, left = (rows - shown_height) // 2, (columns - shown_width) // 2
        patch, crop = self.tile_size / self.side, place.crop
        return (
            ((place.column * self.side + crop.left) * patch - left) / shown_width,
            ((place.row * self.side + crop.top) * patch - top) / shown_height,
            crop.columns * patch / shown_width,
            crop.rows * patch / shown_height,
        )


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
        height: height of the image in pixels.
        width: width of the image in pixels.
        rows: number of rows of patches of the canvas.
        columns: number of columns of patches of the canvas.

    Source: transformers, `unpad_image`, whose floating-point arithmetic this repeats.
    """
    if width / height > columns / rows:
        shown = int(round(height * (columns / width), 7))
        return max(0, rows - 2 * ((rows - shown) // 2)), columns
    shown = int(round(width * (rows / height), 7))
    return rows, max(0, columns - 2 * ((columns - shown) // 2))


@lru_cache(maxsize=4096)
def _places(tiling: AnyRes, height: int, width: int) -> tuple[Place, ...]:
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
