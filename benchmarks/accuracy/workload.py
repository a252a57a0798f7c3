"""Images with questions; those of the embedded benchmark have answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from ficoco_vllm.benchmarks.harness.http import png
from ficoco_vllm.benchmarks.questions.held_out import KINDS_OF_QUESTION, held_out

# Types of the embedded benchmark. The demo model has not learnt `colour_by_number` (MODEL_CARD.md).
KINDS = tuple(kind for kind in KINDS_OF_QUESTION if kind != "colour_by_number")


@dataclass(frozen=True)
class Item:
    """One question of a type, with an encoded image or without one; the right answer is None if it is unknown."""

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
    items = []
    for kind in kinds:
        for index, example in enumerate(held_out(kind, count, seed)):
            question, image = example.question, png(Image.fromarray(example.scene.image))
            items.append(Item(f"{kind}-{seed}-{index}", kind, question.text, image, question.answer))
    return items
