"""One point of traffic against a server, driven by vLLM's own benchmark client."""

import argparse
import asyncio
import json
import logging
import random
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import data_url
from ficoco_vllm.benchmarks.load.sampling import sampling, summary
from ficoco_vllm.benchmarks.load.settings import Target, Traffic

PERCENTILES = (50, 90, 99)
# Figures kept from the client's result.
_FIELDS = ("duration", "completed", "request_throughput", "output_throughput", "total_output_tokens")


def run_point(
    url: str, target: Target, traffic: Traffic, seed: int, finished: Callable[[float], None]
) -> dict[str, Any]:
    """Send the traffic to a server and measure; `finished` gets the number of answered requests now and then.

    Returns:
        The client's figures (milliseconds), `samples` of /metrics over time, and what follows from them: see `summary`.

    Raises:
        RuntimeError: a request failed; with the client's message.
    """
    logging.getLogger("vllm").setLevel(logging.ERROR)  # it also warns while it is imported
    # The client's module takes seconds to import.
    from vllm.benchmarks.serve import main_async

    printed = StringIO()
    with TemporaryDirectory() as folder:
        dataset = None if target.tokenizer else write_dataset(Path(folder), url, target, traffic, seed)
        args = _arguments(url, target, dataset, traffic, seed)
        with sampling(url, target.sample_seconds, finished) as samples, redirect_stdout(printed):
            result = asyncio.run(main_async(args))
    if result["failed"] or result["completed"] != traffic.num_requests:
        errors = "\n".join(dict.fromkeys(filter(None, result["errors"])))
        raise RuntimeError(
            f"{result['failed']} of {traffic.num_requests} requests failed at {traffic.name}:\n"
            + (errors or printed.getvalue())[-2000:]
        )
    point: dict[str, Any] = {name: result[name] for name in _FIELDS}
    for name, values in latencies(result).items():
        for percentile in PERCENTILES:
            point[f"{name}_ms_p{percentile}"] = float(np.percentile(values, percentile)) * 1000
    seen = summary(samples)
    if samples:
        # Reads of /metrics are too rare to see every step.
        seen["num_running_max"] = max(seen["num_running_max"], decoding_together(result))
    return {**point, **seen, "samples": samples}


def latencies(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of each request, or each token, by the name of the latency, from the client's detailed result."""
    timed = zip(result["latencies"], result["ttfts"], result["output_lens"], strict=True)
    return {
        "ttft": result["ttfts"],
        "tpot": [(whole - first) / (count - 1) for whole, first, count in timed if count > 1] or [0.0],
        "itl": [seconds for gaps in result["itls"] for seconds in gaps] or [0.0],
        "e2el": result["latencies"],
    }


def decoding_together(result: Mapping[str, Any]) -> int:
    """Most requests that were between their first and their last token at the same time, as the client saw it."""
    changes: list[tuple[float, int]] = []
    for start, first, whole in zip(result["start_times"], result["ttfts"], result["latencies"], strict=True):
        changes += [(start + first, 1), (start + whole, -1)]
    # At equal times a request ends before another one begins.
    return max(accumulate(change for _, change in sorted(changes)))


def _arguments(
    url: str, target: Target, dataset: Path | None, traffic: Traffic, seed: int
) -> argparse.Namespace:
    from vllm.benchmarks.serve import add_cli_args

    side = traffic.image_side
    options: dict[str, Any] = {
        "--backend": "openai-chat",
        "--base-url": url,
        "--endpoint": "/v1/chat/completions",
        "--model": target.name,
        "--served-model-name": target.name,
        "--num-prompts": traffic.num_requests,
        "--seed": seed,
        "--temperature": 0,
        "--request-rate": "inf" if traffic.rate is None else traffic.rate,
        # The client's own test request is its first one: that image would then be in the server's caches.
        "--ready-check-timeout-sec": 0,
        "--num-warmups": 0,
    }
    flags = ["--disable-tqdm", "--save-detailed", "--ignore-eos"]
    if dataset is None:
        options |= {
            "--tokenizer": target.tokenizer,
            "--dataset-name": "random-mm",
            "--random-input-len": traffic.num_text_tokens,
            "--random-output-len": traffic.num_answer_tokens,
            "--random-mm-bucket-config": f"{{({side}, {side}, 1): 1.0}}",
        }
    else:
        options |= {"--dataset-name": "custom_image", "--dataset-path": dataset}
        options["--custom-output-len"] = traffic.num_answer_tokens
        flags.append("--skip-tokenizer-init")
    if traffic.concurrency is not None:
        options["--max-concurrency"] = traffic.concurrency
    if target.api_key:
        options["--header"] = f"Authorization=Bearer {target.api_key}"
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    return parser.parse_args([*(str(word) for pair in options.items() for word in pair), *flags])


def write_dataset(folder: Path, url: str, target: Target, traffic: Traffic, seed: int) -> Path:
    """Write JSONL for vLLM's `custom_image`: prompts of letters, cut by the server's `/tokenize`, images of noise."""
    rng, side = random.Random(seed), traffic.image_side
    headers = {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    lines = []
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        for _ in range(traffic.num_requests):
            letters = " ".join(rng.choices(ascii_lowercase, k=traffic.num_text_tokens))
            text = _cut(client, target.name, letters, traffic.num_text_tokens)
            image = Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side))
            lines.append(json.dumps({"prompt": text, "image_files": [data_url(image)]}))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _cut(client: httpx.Client, model: str, text: str, num_tokens: int) -> str:
    """The first tokens of a text; the whole text, a letter for each token, where the server does not tokenize."""

    def post(path: str, **body: Any) -> dict[str, Any]:
        answer = client.post(path, json={"model": model, **body})
        return dict(answer.json()) if answer.is_success else {}

    tokens = post("/tokenize", prompt=text, add_special_tokens=False).get("tokens")
    return str((tokens and post("/detokenize", tokens=tokens[:num_tokens]).get("prompt")) or text)
