"""Bundled LLaVA of 3.5 million parameters, which needs no download."""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A held-out image with a question that the model answers correctly.

    Attributes:
        image: path of the PNG file, 192 x 192.
        question: as a user would type it.
        answer: the right answer.
    """

    image: Path
    question: str
    answer: str


def path() -> Path:
    """Folder of the model, in the layout of Hugging Face."""
    return Path(__file__).parent


def examples() -> list[Example]:
    """Example images with questions and correct answers."""
    folder = path() / "examples"
    listed = json.loads((folder / "examples.json").read_text())["examples"]
    return [Example(folder / item["image"], item["question"], item["answer"]) for item in listed]
