"""An engine in a process of its own, for what must not share a process: other plugins, several workers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def answers(
    folder: Path,
    model: Path,
    images: list[Image.Image],
    requests: list[tuple[str, list[int], dict[str, Any]]],
    *,
    ficoco: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Answer requests in a new process.

    Args:
        folder: for the files that pass between the processes.
        model: folder of the model.
        images: that the requests refer to by index.
        requests: prompt, indices of images, mm_processor_kwargs.
        ficoco: settings, or None.
        environment: beside that of this process.
        **options: of the engine.

    Returns:
        What `tests.support.logprobs` saved.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, image in enumerate(images):
        paths.append(str(folder / f"{index}.png"))
        image.save(paths[-1])
    out = folder / "out.pt"
    job = {
        "model": str(model),
        "ficoco": ficoco,
        "options": options,
        "images": paths,
        "requests": requests,
        "out": str(out),
    }
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.logprobs", json.dumps(job)],
        env=os.environ | (environment or {}) | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    loaded: dict[str, Any] = torch.load(out)
    return loaded
