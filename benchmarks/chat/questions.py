"""Held-out chats: two to four questions on one image, each about another thing that it shows."""

import random
from dataclasses import dataclass

from ficoco_vllm.benchmarks.questions.held_out import held_out
from ficoco_vllm.benchmarks.questions.questions import (
    Question,
    count_question,
    digit_question,
    number_question,
    shape_exists_balanced,
    sign_exists_balanced,
)
from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, SHAPES, Scene

_ABOUT_SIGN = ("number_by_colour", "first_digit", "last_digit")
_ABOUT_SCENE = ("yes_no_signs", "count")
_ABOUT_SHAPE = ("colour", "shape", "yes_no_shapes")
KINDS = (*_ABOUT_SIGN, *_ABOUT_SCENE, *_ABOUT_SHAPE)


@dataclass(frozen=True)
class Chat:
    """Two to four questions on one image with their answers, in order; the last one is to be answered."""

    scene: Scene
    turns: tuple[Question, ...]


def held_out_chats(kind: str, count: int, seed: int = 0) -> list[Chat]:
    """Chats whose last question is of one of `KINDS`, each on its own image; the same seed gives the same chats."""
    rng = random.Random(f"chat {kind} {seed}")
    # Images with three signs; with one to three for questions about all of them; with one shape.
    source = {**dict.fromkeys(_ABOUT_SCENE, "last_digit"), **dict.fromkeys(_ABOUT_SHAPE, "yes_no_shapes")}
    examples = held_out(source.get(kind, "number_by_colour_3"), count, rng.getrandbits(32))
    about = _about_shape if kind in _ABOUT_SHAPE else _about_signs
    return [Chat(one.scene, about(one.scene, kind, index, rng)) for index, one in enumerate(examples)]


def _about_signs(scene: Scene, kind: str, index: int, rng: random.Random) -> tuple[Question, ...]:
    """Earlier questions are about other signs; one may be about all signs."""
    signs = rng.sample(scene.signs, len(scene.signs))
    num_earlier = 1 + (index % 2 if kind in _ABOUT_SIGN else index // 3 % len(signs))

    def about_sign(which: str, place: int) -> Question:
        if which == "number_by_colour":
            return number_question(signs[place])
        return digit_question(signs[place], which.removesuffix("_digit"))

    def about_scene(which: str) -> Question:
        if which == "count":
            return count_question(scene.signs)
        return sign_exists_balanced(scene.signs, rng, index % 2 == 0)

    earlier = [about_sign(rng.choice(_ABOUT_SIGN), place) for place in range(num_earlier)]
    if kind in _ABOUT_SCENE:
        return (*earlier, about_scene(kind))
    if index % 4 > 1:
        earlier.insert(rng.randrange(len(earlier) + 1), about_scene(rng.choice(_ABOUT_SCENE)))
    return (*earlier, about_sign(kind, num_earlier))


def _about_shape(scene: Scene, kind: str, index: int, rng: random.Random) -> tuple[Question, ...]:
    assert scene.shape is not None
    questions = {
        "colour": Question("what color is the shape?", COLOUR_NAMES[scene.shape.colour], "colour"),
        "shape": Question("what shape is in the image?", SHAPES[scene.shape.shape], "shape"),
        "yes_no_shapes": shape_exists_balanced(scene.shape, rng, index % 2 == 0, index // 2 % 2 == 0),
    }
    others = rng.sample([name for name in _ABOUT_SHAPE if name != kind], 1 + index % 2)
    return tuple(questions[name] for name in (*others, kind))
