"""What is asked: images with questions, and for the embedded benchmark their right answers."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# Types of the embedded benchmark. `colour_by_number` is left out: the demo model never learnt it (MODEL_CARD.md).
SHAPES = ("colour", "shape", "yes_no_shapes")
SIGNS = (
    "number",
    "number_by_colour_2",
    "number_by_colour_3",
    "first_digit",
    "last_digit",
    "yes_no_signs",
    "count",
)
KINDS = SHAPES + SIGNS


@dataclass(frozen=True)
class Item:
    """One image with one question.

    Attributes:
        name: unique within a workload.
        kind: the type under which it is reported.
        question: as the user types it.
        image: an encoded image, or None for a question without one.
        answer: what is right, or None where nobody knows.
        media_type: of the image.
    """

    name: str
    kind: str
    question: str
    image: bytes | None
    answer: str | None = None
    media_type: str = "image/png"


def embedded(kinds: Sequence[str] = KINDS, count: int = 100, seed: int = 0) -> list[Item]:
    """The embedded benchmark: easy-VQA's test split and rendered signs with held-out numbers.

    A smaller `count` gives the first questions of a larger one.

    Args:
        kinds: types of question.
        count: questions of each.
        seed: of the choice.

    Raises:
        ValueError: there is no such type.
        ModuleNotFoundError: the package `easy-vqa` is not installed.
    """
    from ficoco_vllm.benchmarks.questions.held_out import held_out

    items = []
    for kind in kinds:
        for index, example in enumerate(held_out(kind, count, seed)):
            buffer = io.BytesIO()
            Image.fromarray(example.scene.image).save(buffer, "PNG")
            asked = example.question
            items.append(Item(f"{kind}-{seed}-{index}", kind, asked.text, buffer.getvalue(), asked.answer))
    return items
