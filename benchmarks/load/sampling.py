"""A server's KV cache, queue and preemptions while a point runs, read off /metrics."""

import threading
import time
import urllib.error
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import add
from typing import Any

from ficoco_vllm.benchmarks.harness.http import read_metrics, samples

# vLLM's name to ours; several engines are added up, except for the share of the cache, where the fullest counts.
_FIGURES: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "vllm:num_requests_running": ("num_running", add),
    "vllm:num_requests_waiting": ("num_waiting", add),
    "vllm:num_preemptions_total": ("num_preemptions", add),
    "vllm:prompt_tokens_total": ("num_prompt_tokens", add),
    "vllm:request_success_total": ("num_finished", add),
    "vllm:kv_cache_usage_perc": ("kv_cache_usage", max),
}
# Our metric, by method; stock vLLM does not have it.
_AVOIDED = "ficoco:kv_tokens_avoided_total"
Figures = dict[str, Any]


@contextmanager
def sampling(url: str, interval_seconds: float, finished: Callable[[float], None]) -> Iterator[list[Figures]]:
    """Read /metrics in a separate thread while the block runs.

    Each read is its `seconds` since the start and what `read_figures` finds; there is none where the server has no
    /metrics. `finished` is called after each with the requests that have been answered since the first one.
    """
    reads, start, ended = list[Figures](), time.monotonic(), threading.Event()

    def read() -> None:
        try:
            figures = read_figures(read_metrics(url))
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return
        if figures:
            reads.append({"seconds": round(time.monotonic() - start, 3), **figures})
            finished(figures["num_finished"] - reads[0]["num_finished"])

    def keep_reading() -> None:
        while not ended.wait(interval_seconds):
            read()

    read()
    thread = threading.Thread(target=keep_reading, daemon=True)
    thread.start()
    try:
        yield reads
    finally:
        ended.set()
        thread.join()
        read()


def read_figures(text: str) -> Figures:
    """Figures of vLLM, or nothing where one is missing, and `avoided`, prompt tokens without a KV slot by method."""
    figures: Figures = {}
    avoided: defaultdict[str, float] = defaultdict(float)
    for sample in samples(text):
        if sample.name == _AVOIDED:
            avoided[sample.labels["method"]] += sample.value
        elif sample.name in _FIGURES:
            name, combine = _FIGURES[sample.name]
            figures[name] = combine(figures.get(name, 0.0), sample.value)
    return {**figures, "avoided": avoided} if len(figures) == len(_FIGURES) else {}


def summary(reads: list[Figures]) -> Figures:
    """Most running requests and largest share of the cache; preemptions, prompt tokens and our methods in between."""
    if not reads:
        names = ("num_running_max", "kv_cache_usage_max", "num_preemptions", "num_prompt_tokens")
        return {**dict.fromkeys(names), "reduced_by": []}
    first, last = reads[0], reads[-1]
    return {
        **{f"{name}_max": max(read[name] for read in reads) for name in ("num_running", "kv_cache_usage")},
        **{name: last[name] - first[name] for name in ("num_preemptions", "num_prompt_tokens")},
        "reduced_by": sorted(
            name for name, n in last["avoided"].items() if n > first["avoided"].get(name, 0)
        ),
    }
