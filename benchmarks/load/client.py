"""One point of traffic against a server, driven by vLLM's own benchmark client."""

import argparse
import asyncio
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from ficoco_vllm.benchmarks.load.sampling import Sampler
from ficoco_vllm.benchmarks.load.settings import Traffic

PERCENTILES = (50, 90, 99)
# What is kept of the client's result, beside the percentiles.
_FIELDS = (
    "duration",
    "completed",
    "failed",
    "request_throughput",
    "output_throughput",
    "total_output_tokens",
)
_LATENCIES = ("ttft", "tpot", "itl", "e2el")


def run_point(
    url: str,
    model: str,
    tokenizer: str,
    traffic: Traffic,
    seed: int,
    headers: Mapping[str, str] | None = None,
    sample_seconds: float = 0.5,
) -> dict[str, Any]:
    """Send the traffic and measure.

    Args:
        url: of the server, without a path.
        model: served name.
        tokenizer: folder or name, for prompts of a known length.
        traffic: what to send.
        seed: of prompts and images.
        headers: sent with every request, for example an API key.
        sample_seconds: between two looks at /metrics.

    Returns:
        The client's figures (milliseconds), `samples` of /metrics over time, and what follows from them:
        `num_running_max`, `kv_cache_usage_max`, `num_preemptions` and `num_prompt_tokens`, None where /metrics does not
        say, and `reduced_by`, the methods of ours that were at work.

    Raises:
        RuntimeError: a request failed; with the client's words.
    """
    # The client's module takes seconds to import.
    from vllm.benchmarks.serve import main_async

    args = _arguments(url, model, tokenizer, traffic, seed, headers or {})
    printed = StringIO()
    with Sampler(url, sample_seconds) as sampler, redirect_stdout(printed):
        result = asyncio.run(main_async(args))
    if result["failed"] or result["completed"] != traffic.num_requests:
        raise RuntimeError(
            f"{result['failed']} of {traffic.num_requests} requests failed at {traffic.name}:\n"
            + printed.getvalue()[-2000:]
        )
    point: dict[str, Any] = {name: result[name] for name in _FIELDS}
    for latency in _LATENCIES:
        for percentile in PERCENTILES:
            point[f"{latency}_ms_p{percentile}"] = result[f"p{percentile}_{latency}_ms"]
    return {**point, **sampler.summary(), "reduced_by": sampler.reduced_by(), "samples": sampler.samples}


def _arguments(
    url: str, model: str, tokenizer: str, traffic: Traffic, seed: int, headers: Mapping[str, str]
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
        "--tokenizer": tokenizer,
        "--dataset-name": "random-mm",
        "--num-prompts": traffic.num_requests,
        "--random-input-len": traffic.num_text_tokens,
        "--random-output-len": traffic.num_answer_tokens,
        "--random-mm-bucket-config": f"{{({side}, {side}, 1): 1.0}}",
        "--seed": seed,
        "--temperature": 0,
        "--request-rate": "inf" if traffic.rate is None else traffic.rate,
        "--percentile-metrics": ",".join(_LATENCIES),
        "--metric-percentiles": ",".join(map(str, PERCENTILES)),
        # The client's own test request is its first one: that image would then be in the server's caches.
        "--ready-check-timeout-sec": 0,
        "--num-warmups": 0,
    }
    if traffic.concurrency is not None:
        options["--max-concurrency"] = traffic.concurrency
    words = [str(word) for pair in options.items() for word in pair] + ["--disable-tqdm"]
    if headers:
        words += ["--header", *(f"{name}={value}" for name, value in headers.items())]
    return parser.parse_args(words)
