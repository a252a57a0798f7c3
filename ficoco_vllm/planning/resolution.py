"""Images whose grid of units follows their size (dynamic resolution): integers, no pixels."""

import math
from dataclasses import dataclass
from functools import lru_cache

from ficoco_vllm.planning.tiling import WHOLE, Box, Crop, Place, Tiling

# The largest ratio of an image's sides.
_MAX_ASPECT = 200


@dataclass(frozen=True)
class Resolution(Tiling):
    """The resolutions of a model that scales each image to whole units, between two numbers of pixels.

    The image is one tile, whose crop is its grid.

    Attributes:
        unit_size: height and width of a unit in pixels.
        min_pixels: an image of fewer pixels is enlarged.
        max_pixels: an image of more pixels is shrunk.
    """

    unit_size: int
    min_pixels: int
    max_pixels: int
    dynamic = True

    @property
    def most_tiles(self) -> int:
        """See `Tiling`."""
        return 1

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """See `Tiling`; the flattest image with the most units."""
        rows, columns = _largest(self.max_pixels // self.unit_size**2)
        return ((rows * self.unit_size, columns * self.unit_size),)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of units of an image.

        Args:
            height: in pixels.
            width: in pixels.

        Source: transformers, `smart_resize` of Qwen2-VL, whose floating-point arithmetic this repeats. It refuses
            images with a side 200 times the other one; here these have a grid, too.
        """
        return _grid(self, height, width)

    def fit(self, height: int, width: int, most: int) -> tuple[int, int]:
        """Rows and columns of units of an image that is shrunk to a budget.

        Args:
            height: height of the image in pixels.
            width: width of the image in pixels.
            most: units, at least one.

        Returns:
            The image's own grid if it has no more units, else the model's rule for an image of too many pixels, with
            the budget in place of `max_pixels`. Their product never exceeds the budget.
        """
        rows, columns = self.grid(height, width)
        if rows * columns <= most:
            return rows, columns
        scale = math.sqrt(most / (height * width))
        rows = min(max(1, math.floor(height * scale)), most)
        columns = min(max(1, math.floor(width * scale)), most // rows)
        return rows, columns

    def places(self, height: int, width: int) -> tuple[Place, ...]:
        """See `Tiling`."""
        return self.place(*self.grid(height, width))

    @staticmethod
    def place(rows: int, columns: int) -> tuple[Place]:
        """The one tile of an image with this grid.

        Args:
            rows: number of rows of units.
            columns: number of columns of units.
        """
        return (Place(0, -1, -1, Crop(0, 0, rows, columns)),)

    def box(self, place: Place, height: int, width: int) -> Box:
        """See `Tiling`."""
        return WHOLE


@lru_cache(maxsize=4096)
def _grid(resolution: Resolution, height: int, width: int) -> tuple[int, int]:
    unit = resolution.unit_size
    rows, columns = round(height / unit), round(width / unit)
    if rows * columns * unit**2 > resolution.max_pixels:
        shrink = math.sqrt((height * width) / resolution.max_pixels)
        rows = max(1, math.floor(height / shrink / unit))
        columns = max(1, math.floor(width / shrink / unit))
    elif rows * columns * unit**2 < resolution.min_pixels:
        stretch = math.sqrt(resolution.min_pixels / (height * width))
        rows, columns = math.ceil(height * stretch / unit), math.ceil(width * stretch / unit)
    return rows, columns


@lru_cache(maxsize=64)
def _largest(num_units: int) -> tuple[int, int]:
    """The grid nearest to a square with the most units, up to a number, that an allowed image has."""
    for most in range(num_units, 0, -1):
        for rows in range(math.isqrt(most), 0, -1):
            if most % rows == 0 and most // rows / rows <= _MAX_ASPECT:
                return rows, most // rows
    return 1, 1
