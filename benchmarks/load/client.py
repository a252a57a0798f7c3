"""One point of traffic against a server, driven by vLLM's own benchmark client."""

import argparse
import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ficoco_vllm.benchmarks.load.prompts import write_dataset
from ficoco_vllm.benchmarks.load.sampling import Sampler
from ficoco_vllm.benchmarks.load.settings import Traffic

PERCENTILES = (50, 90, 99)
# Figures kept from the client's result.
_FIELDS = (
    "duration",
    "completed",
    "failed",
    "request_throughput",
    "output_throughput",
    "total_output_tokens",
)


def run_point(
    url: str,
    model: str,
    tokenizer: str | None,
    traffic: Traffic,
    seed: int,
    api_key: str = "",
    sample_seconds: float = 0.5,
    finished: Callable[[float], None] = lambda count: None,
) -> dict[str, Any]:
    """Send the traffic and measure.

    Args:
        url: of the server, without a path.
        model: served name.
        tokenizer: folder or name, for prompts of a known length; None leaves their length to the server's `/tokenize`.
        traffic: what to send.
        seed: of prompts and images.
        api_key: of the server, or empty.
        sample_seconds: between two reads of /metrics.
        finished: called now and then with the number of requests that have been answered.

    Returns:
        The client's figures (milliseconds), `samples` of /metrics over time, and what follows from them:
        `num_running_max`, `kv_cache_usage_max`, `num_preemptions` and `num_prompt_tokens`, None where /metrics does not
        have it, and `reduced_by`, the methods of ours that were at work.

    Raises:
        RuntimeError: a request failed; with the client's words.
    """
    # The client's module takes seconds to import.
    from vllm.benchmarks.serve import main_async

    logging.getLogger("vllm").setLevel(logging.ERROR)
    printed = StringIO()
    with TemporaryDirectory() as folder:
        dataset = None
        if tokenizer is None:
            dataset = write_dataset(Path(folder), url, model, traffic, seed, api_key)
        args = _arguments(url, model, tokenizer, dataset, traffic, seed, api_key)
        with Sampler(url, sample_seconds, finished) as sampler, redirect_stdout(printed):
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
    summary = sampler.summary()
    if summary["num_running_max"] is not None:
        # Reads of /metrics are too rare to see every step.
        summary["num_running_max"] = max(summary["num_running_max"], decoding_together(result))
    return {**point, **summary, "reduced_by": sampler.reduced_by(), "samples": sampler.samples}


def latencies(result: Mapping[str, Any]) -> dict[str, list[float]]:
    """Seconds of each request, or each token, by the name of the latency.

    Args:
        result: of vLLM's client, with details.
    """
    timed = zip(result["latencies"], result["ttfts"], result["output_lens"], strict=True)
    return {
        "ttft": result["ttfts"],
        "tpot": [(whole - first) / (count - 1) for whole, first, count in timed if count > 1] or [0.0],
        "itl": [seconds for gaps in result["itls"] for seconds in gaps] or [0.0],
        "e2el": result["latencies"],
    }


def decoding_together(result: Mapping[str, Any]) -> int:
    """Most requests that were between their first and their last token at the same time, as the client saw it.

    Args:
        result: of vLLM's client, with details.
    """
    starts, firsts, wholes = (result[name] for name in ("start_times", "ttfts", "latencies"))
    changes = [(start + first, 1) for start, first in zip(starts, firsts, strict=True)]
    changes += [(start + whole, -1) for start, whole in zip(starts, wholes, strict=True)]
    # At equal times a request ends before another one begins.
    return max(accumulate(change for _, change in sorted(changes)))


def _arguments(
    url: str,
    model: str,
    tokenizer: str | None,
    dataset: Path | None,
    traffic: Traffic,
    seed: int,
    api_key: str,
) -> argparse.Namespace:
    from vllm.benchmarks.serve import add_cli_args

    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    side = traffic.image_side
    options: dict[str, Any] = {
        "--backend": "openai-chat",
        "--base-url": url,
        "--endpoint": "/v1/chat/completions",
        "--model": model,
        "--served-model-name": model,
        "--num-prompts": traffic.num_requests,
        "--seed": seed,
        "--temperature": 0,
        "--request-rate": "inf" if traffic.rate is None else traffic.rate,
        # The client's own test request is its first one: that image would then be in the server's caches.
        "--ready-check-timeout-sec": 0,
        "--num-warmups": 0,
    }
    if dataset is None:
        options |= {
            "--tokenizer": tokenizer,
            "--dataset-name": "random-mm",
            "--random-input-len": traffic.num_text_tokens,
            "--random-output-len": traffic.num_answer_tokens,
            "--random-mm-bucket-config": f"{{({side}, {side}, 1): 1.0}}",
        }
    else:
        options |= {
            "--dataset-name": "custom_image",
            "--dataset-path": dataset,
            "--custom-output-len": traffic.num_answer_tokens,
        }
    if traffic.concurrency is not None:
        options["--max-concurrency"] = traffic.concurrency
    words = [str(word) for pair in options.items() for word in pair]
    words += ["--disable-tqdm", "--save-detailed", "--ignore-eos"]
    words += ["--skip-tokenizer-init"] if tokenizer is None else []
    words += ["--header", f"Authorization=Bearer {api_key}"] if api_key else []
    return parser.parse_args(words)
