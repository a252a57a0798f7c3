"""Questions about a scene, with their answers and types."""

import random
from dataclasses import dataclass

from ficoco_vllm.benchmarks.demo_model.scene import COLOUR_NAMES, PLACES, SHAPES, Scene, Shape, Sign

NUMBER_BY_COLOUR = (
    "what number is on the {} sign?",
    "what number is on the {} sign?",
    "the {} sign shows what number?",
    "what number does the {} sign show in the image?",
    "what is the {} sign number?",
    "what {} number is shown?",
    "what number is on the {} sign in the image?",
)
COLOUR_OF_SHAPE = ("what color is the {}?", "what is the color of the {}?")
SHAPE_ASKED = ("what shape does the image contain?", "what shape is in the image?", "what shape is present?")
PRESENT = (
    "is there a {}?",
    "is a {} present?",
    "does the image contain a {}?",
    "is there a {} in the image?",
)
ABSENT = (
    "is there not a {} in the image?",
    "is no {} present?",
    "is there not a {}?",
    "does the image not contain a {}?",
)

# Stands for every place in Question.evidence.
ANY = -1


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Attributes:
        text: as the user types it.
        answer: digits, a colour, a shape, "yes" or "no".
        kind: the type under which accuracy is reported.
        evidence: colour and place (ANY for every place) of the digits from which each digit of the answer, or
            its one word, is read; empty where nothing so simple can be said.
    """

    text: str
    answer: str
    kind: str
    evidence: tuple[tuple[int, int], ...] = ()


def evidence_of(sign: Sign) -> tuple[tuple[int, int], ...]:
    """Where the digits of a sign's number stand, one after another; a lone digit stands in any place."""
    if len(sign.number) == 1:
        return ((sign.colour, ANY),)
    return tuple((sign.colour, place) for place in range(len(sign.number)))


def number_question(sign: Sign, rng: random.Random | None = None) -> Question:
    """The number on the sign of a colour; rng chooses the phrasing, None takes the plain one."""
    phrase = NUMBER_BY_COLOUR[0] if rng is None else rng.choice(NUMBER_BY_COLOUR)
    text = phrase.format(COLOUR_NAMES[sign.colour])
    return Question(text, sign.number, "number_by_colour", evidence_of(sign))


def digit_question(sign: Sign, place: str) -> Question:
    """One digit of the number on the sign of a colour."""
    index = PLACES.index(place)
    text = f"what is the {place} digit on the {COLOUR_NAMES[sign.colour]} sign?"
    return Question(text, sign.number[index], f"{place}_digit", ((sign.colour, index),))


def sign_exists(colour: int, signs: tuple[Sign, ...]) -> Question:
    """Whether a sign of a colour is there."""
    answer = "yes" if any(sign.colour == colour for sign in signs) else "no"
    return Question(f"is there a {COLOUR_NAMES[colour]} sign?", answer, "yes_no_signs")


def sign_exists_balanced(signs: tuple[Sign, ...], rng: random.Random, answer: bool) -> Question:
    """A yes/no question whose answer is chosen first."""
    shown = [sign.colour for sign in signs]
    hidden = [colour for colour in range(len(COLOUR_NAMES)) if colour not in shown]
    return sign_exists(rng.choice(shown if answer else hidden), signs)


def other_sign_questions(signs: tuple[Sign, ...], rng: random.Random) -> list[Question]:
    """Everything else that can be asked about signs, in random order."""
    sign = rng.choice(signs)
    asked = [
        Question(
            f"what color is the sign with the number {sign.number}?",
            COLOUR_NAMES[sign.colour],
            "colour_by_number",
            ((sign.colour, ANY),),
        ),
        Question("how many signs are there?", str(len(signs)), "count"),
    ]
    if len(sign.number) == len(PLACES):
        asked += [digit_question(sign, place) for place in PLACES]
    if len(signs) == 1:
        asked += [
            Question("what number is on the sign?", sign.number, "number", evidence_of(sign)),
            Question("what color is the sign?", COLOUR_NAMES[sign.colour], "colour_of_sign"),
        ]
    rng.shuffle(asked)
    return asked


def sign_questions(signs: tuple[Sign, ...], rng: random.Random, count: int) -> list[Question]:
    """A training set of questions for one image: numbers of up to two signs, yes/no, then others."""
    asked = [number_question(sign, rng) for sign in rng.sample(signs, len(signs))[:2]]
    answers = [True, False] if rng.random() < 0.3 else [rng.random() < 0.5]
    asked += [sign_exists_balanced(signs, rng, answer) for answer in answers]
    asked += other_sign_questions(signs, rng)
    while len(asked) < count:
        asked.append(number_question(rng.choice(signs), rng))
    return asked[:count]


def shape_exists_balanced(shape: Shape, rng: random.Random, answer: bool, negated: bool) -> Question:
    """A yes/no question on colour or form whose answer is chosen first, so that guessing gains nothing."""
    names, true = (COLOUR_NAMES, shape.colour) if rng.random() < 0.6 else (SHAPES, shape.shape)
    named = true if answer != negated else rng.choice([index for index in range(len(names)) if index != true])
    thing = f"{names[named]} shape" if names is COLOUR_NAMES else names[named]
    text = rng.choice(ABSENT if negated else PRESENT).format(thing)
    return Question(text, "yes" if answer else "no", "yes_no_shapes")


def shape_questions(shape: Shape, rng: random.Random, count: int, negated: float = 0.5) -> list[Question]:
    """A training set of questions for one easy-VQA image.

    Args:
        shape: what the image shows.
        rng: the only source of randomness.
        count: how many questions.
        negated: share of the yes/no questions that ask for absence.
    """
    asked = []
    for _ in range(count):
        choice = rng.random()
        if choice < 0.2:
            thing = rng.choice(("shape", SHAPES[shape.shape]))
            asked.append(
                Question(rng.choice(COLOUR_OF_SHAPE).format(thing), COLOUR_NAMES[shape.colour], "colour")
            )
        elif choice < 0.45:
            phrases = (*SHAPE_ASKED, f"what is the {COLOUR_NAMES[shape.colour]} shape?")
            asked.append(Question(rng.choice(phrases), SHAPES[shape.shape], "shape"))
        else:
            asked.append(shape_exists_balanced(shape, rng, rng.random() < 0.5, rng.random() < negated))
    return asked


def training_questions(scene: Scene, rng: random.Random, count: int, negated: float = 0.5) -> list[Question]:
    """Training questions for an image of either sort."""
    if scene.shape is not None:
        return shape_questions(scene.shape, rng, count, negated)
    return sign_questions(scene.signs, rng, count)
