"""A server's KV cache, queue and preemptions while a point runs, read off /metrics."""

import threading
import time
import urllib.error
from collections import defaultdict
from collections.abc import Callable

from ficoco_vllm.benchmarks.harness.http import read_metrics, samples

# vLLM's name to ours; several engines are added up, except for the share of the cache, where the fullest counts.
_SUMS = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:num_preemptions_total": "num_preemptions",
    "vllm:prompt_tokens_total": "num_prompt_tokens",
    "vllm:request_success_total": "num_finished",
}
_MAXIMA = {"vllm:kv_cache_usage_perc": "kv_cache_usage"}
# Our metric, by method; stock vLLM does not have it.
_AVOIDED = "ficoco:kv_tokens_avoided_total"


class Sampler:
    """Reads /metrics in a separate thread while its block runs.

    Args:
        url: address of the server, without a path.
        interval_seconds: between two reads.
        finished: called after each read with the requests that have been answered since the first one.

    Attributes:
        samples: one mapping a read, `seconds` since the start and the figures of `_SUMS` and `_MAXIMA`; empty where
            the server has no /metrics.
        avoided: method to the prompt tokens without a KV slot that it has counted, at the first read and at the last.
    """

    def __init__(self, url: str, interval_seconds: float, finished: Callable[[float], None]) -> None:
        self.samples: list[dict[str, float]] = []
        self.avoided: list[dict[str, float]] = []
        self._url, self._interval, self._finished = url, interval_seconds, finished
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._start = time.monotonic()
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self._read()

    def summary(self) -> dict[str, float | None]:
        """Most concurrent requests and largest share of the cache; preemptions and prompt tokens in between."""
        summary: dict[str, float | None] = {}
        for name in ("num_running", "kv_cache_usage"):
            summary[f"{name}_max"] = max((sample[name] for sample in self.samples), default=None)
        for name in ("num_preemptions", "num_prompt_tokens"):
            summary[name] = self.samples[-1][name] - self.samples[0][name] if self.samples else None
        return summary

    def reduced_by(self) -> list[str]:
        """Methods of ours that spared a prompt any KV slot in between."""
        if not self.avoided:
            return []
        first, last = self.avoided[0], self.avoided[-1]
        return sorted(method for method, count in last.items() if count > first.get(method, 0.0))

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._read()

    def _read(self) -> None:
        try:
            text = read_metrics(self._url)
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return
        figures = read_figures(text)
        if figures:
            self.samples.append({"seconds": round(time.monotonic() - self._start, 3), **figures})
            self.avoided = [*self.avoided[:1], read_avoided(text)]
            self._finished(figures["num_finished"] - self.samples[0]["num_finished"])


def read_figures(text: str) -> dict[str, float]:
    """The figures that the load test follows, those of `_SUMS` and `_MAXIMA`; nothing where one is missing."""
    figures: dict[str, float] = {}
    for sample in samples(text):
        if name := _SUMS.get(sample.name):
            figures[name] = figures.get(name, 0.0) + sample.value
        elif name := _MAXIMA.get(sample.name):
            figures[name] = max(figures.get(name, 0.0), sample.value)
    return figures if len(figures) == len(_SUMS) + len(_MAXIMA) else {}


def read_avoided(text: str) -> dict[str, float]:
    """Prompt tokens without a KV slot that a server of ours has counted, by method, over all segments."""
    avoided: defaultdict[str, float] = defaultdict(float)
    for sample in samples(text):
        if sample.name == _AVOIDED:
            avoided[sample.labels["method"]] += sample.value
    return avoided
