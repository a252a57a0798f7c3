"""Contents of an image, and labels of its patches."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Pixels of a side: of an image, and of a patch.
IMAGE_SIZE, PATCH_SIZE = 192, 8

COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0),
    "blue": (0, 0, 255),
    "brown": (165, 42, 42),
    "gray": (128, 128, 128),
    "green": (0, 255, 0),
    "red": (255, 0, 0),
    "teal": (0, 128, 128),
    "yellow": (255, 255, 0),
}
COLOUR_NAMES = tuple(COLOURS)
SHAPES = ("circle", "rectangle", "triangle")
KINDS = ("sign", *SHAPES)
PLACES = ("first", "middle", "last")

# Rows of Scene.labels; 0 means "nothing of this sort in the patch".
DIGIT, PLACE, COLOUR, KIND = range(4)
NUM_CLASSES = (11, 4, 9, 5)

# A patch belongs to what covers at least this share of it.
MIN_COVER = 0.25


@dataclass(frozen=True)
class Sign:
    """A coloured plate with a number; the colour is an index into COLOUR_NAMES."""

    colour: int
    number: str


@dataclass(frozen=True)
class Shape:
    """The one shape of an easy-VQA image, as indices into COLOUR_NAMES and SHAPES."""

    colour: int
    shape: int


@dataclass(frozen=True)
class Scene:
    """One image with everything that questions and patch labels need.

    Attributes:
        image: (height, width, 3), uint8 RGB.
        labels: (4, rows, columns), int8: digit + 1, place + 1, colour + 1, kind + 1 of every patch.
        signs: the signs in drawing order; empty for an easy-VQA image.
        shape: the shape of an easy-VQA image, else None.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int8]
    signs: tuple[Sign, ...] = ()
    shape: Shape | None = None
