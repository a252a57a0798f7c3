"""Visual tokens without images: labels of a small made-up grid, embedded as sums of word embeddings."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ficoco_vllm.benchmarks.questions.questions import Question
from ficoco_vllm.benchmarks.questions.scene import (
    COLOUR,
    COLOUR_NAMES,
    DIGIT,
    KIND,
    KINDS,
    PLACE,
    PLACES,
    SHAPES,
    Shape,
    Sign,
)
from ficoco_vllm.benchmarks.questions.signs import TRAINING_NUMBERS
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.dialogue import Asker
from tools.demo_model.training_questions import shape_questions, sign_questions

ROWS, COLUMNS = 3, 8
SHAPE_SHARE = 0.25
NUM_QUESTIONS = 5
GAP_SHARE = 0.3
NEGATION_DELAY = 150


class VisualVocabulary:
    """Embedding of a patch label as the sum of its words' embeddings.

    Args:
        asker: for the tokens of the words.
    """

    def __init__(self, asker: Asker) -> None:
        digits = [str(digit) for digit in range(10)]
        self.tables = [asker.word_ids(words) for words in (digits, PLACES, COLOUR_NAMES, KINDS)]

    def embed(self, labels: Tensor, embedding: Tensor) -> Tensor:
        """Aligned visual tokens.

        Args:
            labels: (B, 4, N), int64.
            embedding: word embeddings, (V, D), fp32.

        Returns:
            (B, N, D), fp32; a patch that shows nothing is zero.
        """
        parts = [
            embedding[table][labels[:, row]] * (labels[:, row] > 0)[..., None]
            for row, table in enumerate(self.tables)
        ]
        return torch.stack(parts).sum(0)


@dataclass
class Course:
    """Progress of the curriculum.

    Attributes:
        step: steps made.
        three_digits_since: step at which whole numbers began, or None.
    """

    step: int = 0
    three_digits_since: int | None = None

    @property
    def negated(self) -> float:
        """Share of negated yes/no questions."""
        since = self.three_digits_since
        return 0.0 if since is None or self.step < since + NEGATION_DELAY else 0.5


def made_up_image(rng: random.Random, course: Course) -> tuple[NDArray[np.int64], list[Question]]:
    """Labels of a small grid, (4, ROWS, COLUMNS), and questions on it."""
    labels = np.zeros((4, ROWS, COLUMNS), np.int64)
    if rng.random() < SHAPE_SHARE:
        shape = Shape(rng.randrange(len(COLOUR_NAMES)), rng.randrange(len(SHAPES)))
        h, w = rng.randint(1, ROWS), rng.randint(2, 4)
        y, x = rng.randint(0, ROWS - h), rng.randint(0, COLUMNS - w)
        labels[COLOUR, y : y + h, x : x + w] = shape.colour + 1
        labels[KIND, y : y + h, x : x + w] = shape.shape + 2
        return labels, shape_questions(shape, rng, NUM_QUESTIONS, course.negated)
    short = course.three_digits_since is None
    signs = []
    # A single sign can be read without the question, so none is shown until binding is learnt.
    rows = rng.sample(range(ROWS), rng.randint(2 if short else 1, ROWS))
    for row, colour in zip(rows, rng.sample(range(len(COLOUR_NAMES)), len(rows)), strict=True):
        number = rng.choice(TRAINING_NUMBERS)[: 1 if short else 3]
        x, width = rng.randint(0, COLUMNS - len(number) - 2), len(number) + 2
        labels[COLOUR, row, x : x + width] = colour + 1
        labels[KIND, row, x : x + width] = 1
        for edge in (x, x + width - 1):
            if rng.random() < 0.3:
                labels[:, row, edge] = 0
        # A single digit takes any place; otherwise "first" would come to mean "a digit".
        first = rng.randrange(len(PLACES)) if short else 0
        for index, digit in enumerate(number):
            labels[DIGIT, row, x + 1 + index] = int(digit) + 1
            labels[PLACE, row, x + 1 + index] = first + index + 1
        signs.append(Sign(colour, number))
    return labels, sign_questions(tuple(signs), rng, NUM_QUESTIONS)


def made_up_positions(rng: random.Random, course: Course, batch: int) -> tuple[Tensor, int]:
    """Places of a batch's tokens, (batch, N), and how many places the image takes.

    The tokens follow one another or lie anywhere in a full image, in order.
    """
    N = ROWS * COLUMNS
    if course.three_digits_since is not None and rng.random() < GAP_SHARE:
        chosen = torch.rand(batch, ARCHITECTURE.num_patches).topk(N, dim=1).indices
        return chosen.sort(dim=1).values, ARCHITECTURE.num_patches
    return torch.arange(N).expand(batch, -1), N
