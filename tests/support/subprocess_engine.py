"""An engine in a process of its own, for what must not share a process: other plugins, several workers."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from tests.support.engine import Answers, Question


def answers(
    folder: Path,
    model: Path,
    images: Sequence[Image.Image],
    questions: Sequence[Question],
    *,
    environment: dict[str, str],
    ficoco: dict[str, Any] | None = None,
    **options: Any,
) -> Answers:
    """Ask questions in a new process.

    Args:
        folder: for the files that pass between the processes.
        model: folder of the model.
        images: that the questions refer to by index.
        questions: sent together.
        environment: variables beside those of this process.
        ficoco: settings, or None.
        **options: of the engine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        image.save(path)
    out = folder / "out.pt"
    job = {
        "model": str(model),
        "ficoco": ficoco,
        "options": options,
        "images": [str(path) for path in paths],
        "questions": questions,
        "out": str(out),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.logprobs", json.dumps(job)],
        env=os.environ | environment | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    loaded: Answers = torch.load(out, weights_only=False)
    return loaded
