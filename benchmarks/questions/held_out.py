"""The held-out set: images and questions that training never saw, one list for each type of question."""

import random
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

_ABOUT_SHAPE = ("colour", "shape", "yes_no_shapes")
_ABOUT_NUMBERS = ("number", "number_by_colour_2", "number_by_colour_3", "first_digit", "last_digit")
KINDS_OF_QUESTION = (*_ABOUT_SHAPE, *_ABOUT_NUMBERS, "yes_no_signs", "count", "colour_by_number")


@dataclass(frozen=True)
class Example:
    """One held-out image of 192 x 192 pixels with one question."""

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


def _about_signs(kind: str, rng: random.Random, index: int) -> Example:
    counts = {"number": 1, "number_by_colour_2": 2, "number_by_colour_3": 3}
    counts |= {"colour_by_number": 2 + index % 2, "yes_no_signs": 1 + index // 2 % 3}
    scene = _signs(rng, counts.get(kind, 1 + index % 3))
    match kind:
        case "number":
            question = lone_number_question(scene.signs[0])
        case "number_by_colour_2" | "number_by_colour_3":
            question = replace(number_question(rng.choice(scene.signs)), kind=kind)
        case "first_digit" | "last_digit":
            question = digit_question(rng.choice(scene.signs), kind.removesuffix("_digit"))
        case "yes_no_signs":
            question = sign_exists_balanced(scene.signs, rng, index % 2 == 0)
        case "colour_by_number":
            question = colour_question(rng.choice(scene.signs))
        case _:
            question = count_question(scene.signs)
    return Example(scene, question)


def _about_shape(kind: str, rng: random.Random, index: int) -> Example:
    split = _test_split()
    if kind == "yes_no_shapes":
        image = rng.choice(split.indices)
        question = shape_exists_balanced(split.shapes[image], rng, index % 2 == 0, index // 2 % 2 == 0)
        return Example(split.scene(image), question)
    names = COLOUR_NAMES if kind == "colour" else SHAPES
    while True:  # until the image has a question of easy-VQA itself with such an answer
        image = rng.choice(split.indices)
        pairs = [pair for pair in split.questions[image] if pair[1] in names]
        if pairs:
            return Example(split.scene(image), Question(*rng.choice(pairs), kind))


def held_out(kind: str, count: int, seed: int = 0) -> list[Example]:
    """Held-out questions of one type, each on an image of its own; the same seed gives the same ones.

    easy-VQA questions are on images of its test split; signs carry only the 90 numbers that training never
    shows. Yes/no questions are balanced within their phrasing: half of them have the answer yes, and half
    of the easy-VQA ones ask for absence.

    Raises:
        ValueError: there is no such type.
    """
    if kind not in KINDS_OF_QUESTION:
        raise ValueError(f"kind must be one of {', '.join(KINDS_OF_QUESTION)}, not {kind!r}")
    rng = random.Random(f"{kind} {seed}")
    make = _about_shape if kind in _ABOUT_SHAPE else _about_signs
    return [make(kind, rng, index) for index in range(count)]
