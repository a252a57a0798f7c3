"""Images of one to three coloured signs with three-digit numbers, rendered with Pillow's own font."""

import random
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ficoco_vllm.benchmarks.questions.scene import (
    COLOUR,
    COLOUR_NAMES,
    COLOURS,
    DIGIT,
    KIND,
    MIN_COVER,
    PLACE,
    Scene,
    Sign,
)
from ficoco_vllm.benchmarks.questions.scene import PATCH_SIZE as P

FONT_SIZES = tuple(range(24, 35))
BRIGHT = ("yellow", "green")
GAP = 3
PLACING_TRIES = 40

_numbers = [str(number) for number in range(100, 1000)]
random.Random(7).shuffle(_numbers)
# The three-digit numbers that are never shown in training, and those that are.
HELD_OUT_NUMBERS, TRAINING_NUMBERS = tuple(sorted(_numbers[:90])), tuple(sorted(_numbers[90:]))


@cache
def number_mask(number: str, size: int) -> tuple[NDArray[np.float32], tuple[float, ...]]:
    """A number as a mask, for reuse on any plate.

    Returns:
        Coverage of every pixel in [0, 1], (height, width), cut to the ink, and where every digit begins,
        with the end of the last one, in pixels from the left edge of the cut.
    """
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(number)
    canvas = Image.new("L", (int(right - left) + 1, int(bottom - top)), 0)
    ImageDraw.Draw(canvas).text((-left, -top), number, font=font, fill=255)
    edges = tuple(font.getlength(number[:count]) - left for count in range(len(number) + 1))
    return np.asarray(canvas, dtype=np.float32) / np.float32(255), edges


def overlap(start: float, stop: float, num_cells: int) -> NDArray[np.float32]:
    """Length of [start, stop) inside every patch row or column, in pixels, (num_cells,)."""
    cells = np.arange(num_cells, dtype=np.float32) * P
    inside = np.minimum(cells + P, stop) - np.maximum(cells, start)
    return np.asarray(np.maximum(inside, 0), dtype=np.float32)


def render_signs(
    rng: random.Random, height: int, width: int, numbers: tuple[str, ...], num_signs: int
) -> Scene:
    """Draw signs of different colours with some of the numbers; they do not touch, on a light background.

    Height and width in pixels are multiples of the patch size. A sign that finds no free place is left out; the first
    one always fits.
    """
    rows, columns = height // P, width // P
    image = np.empty((height, width, 3), np.float32)
    image[:] = [rng.randint(225, 252) for _ in range(3)]
    labels = np.zeros((4, rows, columns), np.int8)
    digit_cover = np.full((rows, columns), MIN_COVER * P * P, np.float32)
    taken: list[tuple[int, int, int, int]] = []
    signs: list[Sign] = []
    for colour in rng.sample(range(len(COLOUR_NAMES)), num_signs):
        number = rng.choice(numbers)
        for _ in range(PLACING_TRIES):
            mask, edges = number_mask(number, rng.choice(FONT_SIZES))
            pad_x, pad_y = rng.randint(3, 6), rng.randint(3, 6)
            h, w = mask.shape[0] + 2 * pad_y, mask.shape[1] + 2 * pad_x
            if h > height or w > width:
                continue
            x, y = rng.randint(0, width - w), rng.randint(0, height - h)
            if all(x + w + GAP < a or c + GAP < x or y + h + GAP < b or d + GAP < y for a, b, c, d in taken):
                break
        else:
            continue
        taken.append((x, y, x + w, y + h))
        signs.append(Sign(colour, number))
        name = COLOUR_NAMES[colour]
        plate, ink = np.array(COLOURS[name]), np.array((0, 0, 0) if name in BRIGHT else (255, 255, 255))
        image[y : y + h, x : x + w] = plate
        left, top = x + pad_x, y + pad_y
        image[top : top + mask.shape[0], left : left + mask.shape[1]] = plate + mask[..., None] * (
            ink - plate
        )

        plate_cover = np.outer(overlap(y, y + h, rows), overlap(x, x + w, columns))
        covered = plate_cover >= MIN_COVER * P * P
        labels[COLOUR][covered] = colour + 1
        labels[KIND][covered] = 1
        down = overlap(top, top + mask.shape[0], rows)
        for place, digit in enumerate(number):
            cover = np.outer(down, overlap(left + edges[place], left + edges[place + 1], columns))
            better = cover > digit_cover
            digit_cover[better] = cover[better]
            labels[DIGIT][better] = int(digit) + 1
            labels[PLACE][better] = place + 1
    return Scene(image.astype(np.uint8), labels, tuple(signs))
