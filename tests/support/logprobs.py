"""Run as a program: answers of one engine, with all log-probabilities, written to a file."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image


def main(job: dict[str, Any]) -> None:
    """Start an engine and answer requests.

    Args:
        job: `model`, `ficoco` (or None), `options` of the engine, `images` (paths), `requests` as
            [prompt, indices of images, mm_processor_kwargs] and `out`.
    """
    from tests.support.engine import ask, make_engine, model_class, request

    engine = make_engine(Path(job["model"]), job["ficoco"], **job["options"])
    images = [Image.open(path).convert("RGB") for path in job["images"]]
    requests = [
        request(prompt, [images[i] for i in indices], **kwargs) for prompt, indices, kwargs in job["requests"]
    ]
    answers = ask(engine, requests)
    torch.save(
        {
            "model_class": engine.apply_model(model_class)[0],
            "answers": [(answer.tokens, answer.num_prompt_tokens, answer.logprobs) for answer in answers],
        },
        job["out"],
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
