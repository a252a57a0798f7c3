"""Training windows of images, small ones first, with their labels."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, KINDS, PLACES, Scene
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from ficoco_vllm.benchmarks.questions.signs import TRAINING_NUMBERS, render_signs
from tools.demo_model.architecture import ARCHITECTURE

P = ARCHITECTURE.patch_size
NUM_DIGIT_FLAGS = 10 * len(PLACES)
NUM_FLAGS = len(COLOUR_NAMES) + len(KINDS) + NUM_DIGIT_FLAGS


@dataclass(frozen=True)
class Window:
    """Input of one training step: `batch` windows of rows x columns patches.

    Attributes:
        rows: patches down.
        columns: patches across.
        batch: images in the step.
        shapes: share of easy-VQA images.
        max_signs: most signs in one window.
    """

    rows: int
    columns: int
    batch: int
    shapes: float
    max_signs: int


READING = Window(5, 9, 128, 0.0, 1)
SMALL = Window(8, 8, 96, 0.65, 1)
MEDIUM = Window(12, 12, 48, 0.45, 2)
LARGE = Window(16, 16, 24, 0.4, 3)
FULL = Window(24, 24, 12, 0.35, 3)

# (end as a share of the stage, windows to choose from with their weights): small windows teach most per second, but a
# tower trained on them alone misses half of the digits in the full image.
CURRICULUM: tuple[tuple[float, dict[Window, float]], ...] = (
    (0.35, {READING: 0.75, SMALL: 0.25}),
    (0.6, {READING: 0.25, SMALL: 0.1, MEDIUM: 0.5, LARGE: 0.15}),
    (1.0, {READING: 0.15, MEDIUM: 0.3, LARGE: 0.3, FULL: 0.25}),
)


def choose_window(rng: random.Random, progress: float) -> Window:
    """The window of the next step, by how much of the stage is done (0 to 1)."""
    for until, choices in CURRICULUM:
        if progress < until or until == 1.0:
            return rng.choices(list(choices), list(choices.values()))[0]
    raise AssertionError("the curriculum ends at 1.0")


def random_positions(rng: random.Random, batch: int, rows: int, columns: int) -> Tensor:
    """Grid indices of a window at a random place for each image, (batch, rows * columns) int64."""
    grid = ARCHITECTURE.grid
    inside = (torch.arange(rows)[:, None] * grid + torch.arange(columns)).reshape(1, -1)
    corner = [rng.randint(0, grid - rows) * grid + rng.randint(0, grid - columns) for _ in range(batch)]
    return inside + torch.tensor(corner)[:, None]


def image_flags(scene: Scene) -> NDArray[np.float32]:
    """Labels of [CLS]: colours, kinds, digits with their places, (NUM_FLAGS,)."""
    flags = np.zeros(NUM_FLAGS, np.float32)
    offset_kind, offset_digit = len(COLOUR_NAMES), len(COLOUR_NAMES) + len(KINDS)
    if scene.shape is not None:
        flags[scene.shape.colour] = flags[offset_kind + 1 + scene.shape.shape] = 1
    for sign in scene.signs:
        flags[sign.colour] = flags[offset_kind] = 1
        for place, digit in enumerate(sign.number):
            flags[offset_digit + 10 * place + int(digit)] = 1
    return flags


def draw(rng: random.Random, shapes: EasyVqa, window: Window) -> Scene:
    """One training image of the size of the window."""
    if rng.random() < window.shapes:
        return shapes.scene(rng.choice(shapes.indices), rng, window.rows * P)
    count = rng.randint(1, window.max_signs)
    return render_signs(rng, window.rows * P, window.columns * P, TRAINING_NUMBERS, count)
