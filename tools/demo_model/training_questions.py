"""Questions that the demo model is trained on, several for one image."""

import random

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
from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, PLACES, SHAPES, Scene, Shape, Sign

COLOUR_OF_SHAPE = ("what color is the {}?", "what is the color of the {}?")
SHAPE_ASKED = ("what shape does the image contain?", "what shape is in the image?", "what shape is present?")


def other_sign_questions(signs: tuple[Sign, ...], rng: random.Random) -> list[Question]:
    """All other questions about signs, in random order."""
    sign = rng.choice(signs)
    questions = [colour_question(sign), count_question(signs)]
    if len(sign.number) == len(PLACES):
        questions += [digit_question(sign, place) for place in PLACES]
    if len(signs) == 1:
        questions += [
            lone_number_question(sign),
            Question("what color is the sign?", COLOUR_NAMES[sign.colour], "colour_of_sign"),
        ]
    rng.shuffle(questions)
    return questions


def sign_questions(signs: tuple[Sign, ...], rng: random.Random, count: int) -> list[Question]:
    """A training set of questions for one image: numbers of up to two signs, yes/no, then others."""
    questions = [number_question(sign, rng) for sign in rng.sample(signs, len(signs))[:2]]
    answers = [True, False] if rng.random() < 0.3 else [rng.random() < 0.5]
    questions += [sign_exists_balanced(signs, rng, answer) for answer in answers]
    questions += other_sign_questions(signs, rng)
    while len(questions) < count:
        questions.append(number_question(rng.choice(signs), rng))
    return questions[:count]


def shape_questions(shape: Shape, rng: random.Random, count: int, negated: float = 0.5) -> list[Question]:
    """A training set of questions for one easy-VQA image.

    Args:
        shape: shown by the image.
        rng: the only source of randomness.
        count: number of questions.
        negated: share of the yes/no questions that ask for absence.
    """
    questions = []
    for _ in range(count):
        choice = rng.random()
        if choice < 0.2:
            thing = rng.choice(("shape", SHAPES[shape.shape]))
            questions.append(
                Question(rng.choice(COLOUR_OF_SHAPE).format(thing), COLOUR_NAMES[shape.colour], "colour")
            )
        elif choice < 0.45:
            phrases = (*SHAPE_ASKED, f"what is the {COLOUR_NAMES[shape.colour]} shape?")
            questions.append(Question(rng.choice(phrases), SHAPES[shape.shape], "shape"))
        else:
            questions.append(shape_exists_balanced(shape, rng, rng.random() < 0.5, rng.random() < negated))
    return questions


def training_questions(scene: Scene, rng: random.Random, count: int, negated: float = 0.5) -> list[Question]:
    """Training questions for an image of either sort."""
    if scene.shape is not None:
        return shape_questions(scene.shape, rng, count, negated)
    return sign_questions(scene.signs, rng, count)
