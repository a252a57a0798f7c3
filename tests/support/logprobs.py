"""Run as a program: answers of one engine to questions, written to a file."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def main(job: dict[str, Any]) -> None:
    """Start an engine and ask.

    Args:
        job: `model`, `ficoco` (or None), `options` of the engine, `images` (paths), `questions` and `out`.
    """
    from tests.support.engine import ask_all, make_engine

    engine = make_engine(Path(job["model"]), job["ficoco"], **job["options"])
    images = [Image.open(path).convert("RGB") for path in job["images"]]
    torch.save(ask_all(engine, images, job["questions"]), job["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
