"""The held-out set: images and questions that training never saw, one list for each type of question."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

from ficoco_vllm.benchmarks.questions.questions import (
    Question,
    colour_question,
    count_question,
    digit_question,
    lone_number_question,
    number_question,
    shape_exists_balanced,
    sign_exists_balanced,
)
from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, IMAGE_SIZE, SHAPES, Scene
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from ficoco_vllm.benchmarks.questions.signs import HELD_OUT_NUMBERS, render_signs


@dataclass(frozen=True)
class Example:
    """One held-out image with one question.

    Attributes:
        scene: the image, 192 x 192, and what it shows.
        question: the question and its right answer.
    """

    scene: Scene
    question: Question


@cache
def _test_split() -> EasyVqa:
    return EasyVqa("test")


def _signs(rng: random.Random, num_signs: int) -> Scene:
    """Exactly `num_signs` signs, with held-out numbers only."""
    while True:
        scene = render_signs(rng, IMAGE_SIZE, IMAGE_SIZE, HELD_OUT_NUMBERS, num_signs)
        if len(scene.signs) == num_signs and len({sign.number for sign in scene.signs}) == num_signs:
            return scene


def _original(names: tuple[str, ...], kind: str) -> Callable[[random.Random, int], Example]:
    """Questions of easy-VQA itself whose answer is one of some names."""

    def make(rng: random.Random, _: int) -> Example:
        while True:
            index = rng.choice(_test_split().indices)
            pairs = [pair for pair in _test_split().questions[index] if pair[1] in names]
            if pairs:
                return Example(_test_split().scene(index), Question(*rng.choice(pairs), kind))

    return make


def _number(rng: random.Random, _: int) -> Example:
    scene = _signs(rng, 1)
    return Example(scene, lone_number_question(scene.signs[0]))


def _number_by_colour(num_signs: int) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, _: int) -> Example:
        scene = _signs(rng, num_signs)
        question = number_question(rng.choice(scene.signs))
        return Example(scene, replace(question, kind=f"number_by_colour_{num_signs}"))

    return make


def _digit(place: str) -> Callable[[random.Random, int], Example]:
    def make(rng: random.Random, index: int) -> Example:
        scene = _signs(rng, 1 + index % 3)
        return Example(scene, digit_question(rng.choice(scene.signs), place))

    return make


def _colour_by_number(rng: random.Random, index: int) -> Example:
    scene = _signs(rng, 2 + index % 2)
    return Example(scene, colour_question(rng.choice(scene.signs)))


def _count(rng: random.Random, index: int) -> Example:
    scene = _signs(rng, 1 + index % 3)
    return Example(scene, count_question(scene.signs))


def _yes_no_signs(rng: random.Random, index: int) -> Example:
    scene = _signs(rng, 1 + index // 2 % 3)
    return Example(scene, sign_exists_balanced(scene.signs, rng, index % 2 == 0))


def _yes_no_shapes(rng: random.Random, index: int) -> Example:
    image = rng.choice(_test_split().indices)
    shape = _test_split().shapes[image]
    question = shape_exists_balanced(shape, rng, index % 2 == 0, index // 2 % 2 == 0)
    return Example(_test_split().scene(image), question)


_MAKERS: dict[str, Callable[[random.Random, int], Example]] = {
    "colour": _original(COLOUR_NAMES, "colour"),
    "shape": _original(SHAPES, "shape"),
    "number": _number,
    "number_by_colour_2": _number_by_colour(2),
    "number_by_colour_3": _number_by_colour(3),
    "first_digit": _digit("first"),
    "last_digit": _digit("last"),
    "yes_no_signs": _yes_no_signs,
    "yes_no_shapes": _yes_no_shapes,
    "colour_by_number": _colour_by_number,
    "count": _count,
}
KINDS_OF_QUESTION = tuple(_MAKERS)


def held_out(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Held-out questions of one type, each on an image of its own.

    easy-VQA questions are on images of its test split; signs carry only the 90 numbers that training never
    shows. Yes/no questions are balanced within their phrasing: half of them have the answer yes, and half
    of the easy-VQA ones ask for absence.

    Args:
        kind: one of KINDS_OF_QUESTION.
        count: how many.
        seed: the same seed gives the same images and questions.

    Raises:
        ValueError: there is no such type.
    """
    if kind not in _MAKERS:
        raise ValueError(f"kind must be one of {', '.join(KINDS_OF_QUESTION)}, not {kind!r}")
    rng = random.Random(f"{kind} {seed}")
    return [_MAKERS[kind](rng, index) for index in range(count)]
