"""easy-VQA: images of one coloured shape, and their questions (the PyPI package `easy-vqa`, MIT licence)."""

import random
from collections import defaultdict
from functools import cached_property
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ficoco_vllm.benchmarks.questions.scene import (
    COLOUR,
    COLOURS,
    IMAGE_SIZE,
    KIND,
    PATCH_SIZE,
    SHAPES,
    Scene,
    Shape,
)

NATIVE = 64
SCALE = IMAGE_SIZE // NATIVE


class EasyVqa:
    """The split "train" or "test" of easy-VQA, with colours from the pixels and shapes from the answers.

    Raises:
        ModuleNotFoundError: `easy-vqa` is not installed.
    """

    def __init__(self, split: str) -> None:
        package = import_module("easy_vqa")
        self._paths: dict[int, str] = getattr(package, f"get_{split}_image_paths")()
        self.questions: dict[int, list[tuple[str, str]]] = defaultdict(list)
        for question, answer, index in zip(*getattr(package, f"get_{split}_questions")(), strict=True):
            self.questions[index].append((question, answer))

    @cached_property
    def images(self) -> list[NDArray[np.uint8]]:
        """All images, (64, 64, 3) uint8."""
        return [np.array(Image.open(path).convert("RGB")) for _, path in sorted(self._paths.items())]

    @cached_property
    def masks(self) -> list[NDArray[np.bool_]]:
        """Where the shape is, (64, 64), for every image."""
        masks = []
        for image in self.images:
            pixels = image.astype(int)
            border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            masks.append(np.abs(pixels - np.median(border, 0)).sum(-1) > 30)
        return masks

    @cached_property
    def shapes(self) -> dict[int, Shape]:
        """Colour and shape of every image whose answers give its shape (about seven of eight)."""
        return {
            index: Shape(main_colour(image, mask), shape)
            for index, (image, mask) in enumerate(zip(self.images, self.masks, strict=True))
            if (shape := shape_of(self.questions[index])) is not None
        }

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """Images whose shape is known."""
        return tuple(self.shapes)

    def scene(self, index: int, rng: random.Random | None = None, size: int = IMAGE_SIZE) -> Scene:
        """An image at three times its native size, in a square window of `size` pixels.

        `rng` mirrors the image, moves the shape, and lets the window hold as much of it as fits.
        """
        image, mask = self.images[index], self.masks[index]
        if rng is not None:
            if rng.random() < 0.5:
                image, mask = image[:, ::-1], mask[:, ::-1]
            x0, y0, x1, y1 = bounding_box(mask)
            shift = (rng.randint(-y0, NATIVE - y1), rng.randint(-x0, NATIVE - x1))
            image, mask = np.roll(image, shift, (0, 1)), np.roll(mask, shift, (0, 1))
        window = size // SCALE
        if rng is not None and window < NATIVE:
            x0, y0, x1, y1 = bounding_box(mask)
            x, y = window_start(rng, x0, x1, window), window_start(rng, y0, y1, window)
            image, mask = image[y : y + window, x : x + window], mask[y : y + window, x : x + window]
        cells = size // PATCH_SIZE
        big = Image.fromarray(np.ascontiguousarray(image)).resize((size, size), Image.Resampling.BICUBIC)
        share = Image.fromarray(np.ascontiguousarray(mask, dtype=np.uint8) * 255)
        cover = np.asarray(share.resize((cells, cells), Image.Resampling.BOX), dtype=np.float32) / 255
        shape = self.shapes[index]
        labels = np.zeros((4, cells, cells), np.int8)
        inside = cover >= min(0.3, cover.max())
        labels[COLOUR][inside] = shape.colour + 1
        labels[KIND][inside] = shape.shape + 2
        return Scene(np.asarray(big), labels, shape=shape)


def bounding_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom (exclusive) of the true pixels of (height, width)."""
    ys, xs = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def window_start(rng: random.Random, start: int, stop: int, window: int) -> int:
    """Where a window may begin so that it holds [start, stop), or as much of it as fits."""
    low, high = sorted((max(0, stop - window), min(NATIVE - window, start)))
    return rng.randint(low, high)


def main_colour(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> int:
    """Index of the colour name nearest to the most frequent pixel of the shape; (64, 64, 3) and (64, 64)."""
    values, counts = np.unique(image[mask], axis=0, return_counts=True)
    names = np.array(list(COLOURS.values()))
    return int(np.abs(names - values[counts.argmax()].astype(int)).sum(-1).argmin())


def shape_of(questions: list[tuple[str, str]]) -> int | None:
    """Index of the shape that the answers give, or None when no answer settles it."""
    for question, answer in questions:
        if answer in SHAPES:
            return SHAPES.index(answer)
        named = [shape for shape in SHAPES if shape in question]
        if named and answer in ("yes", "no") and (answer == "yes") != is_negated(question):
            return SHAPES.index(named[0])
    return None


def is_negated(question: str) -> bool:
    """Whether the question asks for absence ("is there not a circle?")."""
    return " not " in question or " no " in question
