"""Questions about a scene, with their answers and types."""

import random
from dataclasses import dataclass

from ficoco_vllm.benchmarks.questions.scene import COLOUR_NAMES, PLACES, SHAPES, Shape, Sign

NUMBER_BY_COLOUR = (
    "what number is on the {} sign?",
    "what number is on the {} sign?",
    "the {} sign shows what number?",
    "what number does the {} sign show in the image?",
    "what is the {} sign number?",
    "what {} number is shown?",
    "what number is on the {} sign in the image?",
)
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

# Any place, in Question.evidence.
ANY = -1


@dataclass(frozen=True)
class Question:
    """A question with its answer, which is digits, a colour, a shape, "yes" or "no".

    Attributes:
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


def lone_number_question(sign: Sign) -> Question:
    """The number on the only sign."""
    return Question("what number is on the sign?", sign.number, "number", evidence_of(sign))


def colour_question(sign: Sign) -> Question:
    """The colour of the sign with a number."""
    text = f"what color is the sign with the number {sign.number}?"
    return Question(text, COLOUR_NAMES[sign.colour], "colour_by_number", ((sign.colour, ANY),))


def count_question(signs: tuple[Sign, ...]) -> Question:
    """The number of signs."""
    return Question("how many signs are there?", str(len(signs)), "count")


def sign_exists_balanced(signs: tuple[Sign, ...], rng: random.Random, answer: bool) -> Question:
    """A yes/no question on the colour of a sign whose answer is chosen first."""
    shown = [sign.colour for sign in signs]
    hidden = [colour for colour in range(len(COLOUR_NAMES)) if colour not in shown]
    name = COLOUR_NAMES[rng.choice(shown if answer else hidden)]
    return Question(f"is there a {name} sign?", "yes" if answer else "no", "yes_no_signs")


def shape_exists_balanced(shape: Shape, rng: random.Random, answer: bool, negated: bool) -> Question:
    """A yes/no question on colour or form whose answer is chosen first, so that guessing gains nothing."""
    names, true = (COLOUR_NAMES, shape.colour) if rng.random() < 0.6 else (SHAPES, shape.shape)
    named = true if answer != negated else rng.choice([index for index in range(len(names)) if index != true])
    thing = f"{names[named]} shape" if names is COLOUR_NAMES else names[named]
    text = rng.choice(ABSENT if negated else PRESENT).format(thing)
    return Question(text, "yes" if answer else "no", "yes_no_shapes")
