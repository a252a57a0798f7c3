"""Images with questions; those of the embedded benchmark have answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ficoco_vllm.benchmarks.harness.http import png

# Types of the embedded benchmark, without `colour_by_number`, which the demo model has not learnt (MODEL_CARD.md).
KINDS = (
    "colour",
    "shape",
    "yes_no_shapes",
    "number",
    "number_by_colour_2",
    "number_by_colour_3",
    "first_digit",
    "last_digit",
    "yes_no_signs",
    "count",
)


@dataclass(frozen=True)
class Item:
    """One image with one question.

    Attributes:
        kind: type of the question, for the report.
        image: an encoded image, or None for a question without one.
        answer: the right one, or None if unknown.
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

    Raises:
        ValueError: there is no such type.
        ModuleNotFoundError: the package `easy-vqa` is not installed.
    """
    from ficoco_vllm.benchmarks.questions.held_out import held_out

    items = []
    for kind in kinds:
        for index, example in enumerate(held_out(kind, count, seed)):
            question, image = example.question, png(Image.fromarray(example.scene.image))
            items.append(Item(f"{kind}-{seed}-{index}", kind, question.text, image, question.answer))
    return items
