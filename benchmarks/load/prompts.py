"""Prompts for a server whose tokenizer is not at hand: letters and noise, their length set by its `/tokenize`."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import httpx
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import data_url
from ficoco_vllm.benchmarks.load.settings import Traffic


def write_dataset(folder: Path, url: str, model: str, traffic: Traffic, seed: int, api_key: str = "") -> Path:
    """Write a data set for vLLM's benchmark client (`custom_image`).

    Args:
        folder: for the file.
        url: of the server, without a path.
        model: served name.
        traffic: number and length of the prompts.
        seed: of letters and pixels.
        api_key: of the server, or empty.

    Returns:
        A JSONL file with a prompt and an image, as a data URL, in each line.
    """
    rng, side = random.Random(seed), traffic.image_side
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    lines = []
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        for _ in range(traffic.num_requests):
            text = _text(
                client,
                model,
                " ".join(rng.choices(ascii_lowercase, k=traffic.num_text_tokens)),
                traffic.num_text_tokens,
            )
            image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
            lines.append(json.dumps({"prompt": text, "image_files": [data_url(image)]}))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _text(client: httpx.Client, model: str, text: str, num_tokens: int) -> str:
    """The first tokens of a text; the whole text, a letter for each token, where the server does not tokenize."""
    tokens = _post(client, "/tokenize", {"model": model, "prompt": text, "add_special_tokens": False}).get(
        "tokens"
    )
    if tokens is None:
        return text
    shorter = _post(client, "/detokenize", {"model": model, "tokens": tokens[:num_tokens]}).get("prompt")
    return str(shorter) if shorter else text


def _post(client: httpx.Client, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    answer = client.post(path, json=body)
    return dict(answer.json()) if answer.is_success else {}
