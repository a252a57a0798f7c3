"""A server's KV cache, queue and preemptions while a point runs, read off /metrics."""

import threading
import time
import urllib.error
import urllib.request
from types import TracebackType

# vLLM's name to ours; several engines are added up, but for the share of the cache, of which the fullest counts.
_SUMS = {
    "vllm:num_requests_running": "num_running",
    "vllm:num_requests_waiting": "num_waiting",
    "vllm:num_preemptions_total": "num_preemptions",
}
_MAXIMA = {"vllm:kv_cache_usage_perc": "kv_cache_usage"}


class Sampler:
    """Looks at /metrics in a thread of its own from entering to leaving.

    Attributes:
        samples: one mapping a look, `seconds` since the start and the figures of `_SUMS` and `_MAXIMA`; empty where
            the server has no /metrics.
    """

    def __init__(self, url: str, interval_seconds: float) -> None:
        self.samples: list[dict[str, float]] = []
        self._url = f"{url}/metrics"
        self._interval = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._start = time.monotonic()
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def summary(self) -> dict[str, float | None]:
        """The largest number of requests that ran at once, the fullest cache, and the preemptions in between."""
        if not self.samples:
            return {"num_running_max": None, "kv_cache_usage_max": None, "num_preemptions": None}
        first, last = self.samples[0], self.samples[-1]
        return {
            "num_running_max": max(sample["num_running"] for sample in self.samples),
            "kv_cache_usage_max": max(sample["kv_cache_usage"] for sample in self.samples),
            "num_preemptions": last["num_preemptions"] - first["num_preemptions"],
        }

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._look()

    def _look(self) -> None:
        try:
            with urllib.request.urlopen(self._url, timeout=10) as answer:
                text = answer.read().decode()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return
        found = read_metrics(text)
        if found:
            self.samples.append({"seconds": round(time.monotonic() - self._start, 3), **found})


def read_metrics(text: str) -> dict[str, float]:
    """The figures that the load test follows.

    Args:
        text: what /metrics answers.

    Returns:
        `num_running`, `num_waiting`, `num_preemptions`, `kv_cache_usage` (0 to 1), or nothing where one is missing.
    """
    # Not at the top: the command line loads this module, and whoever serves names the folder that processes share
    # before prometheus_client is imported.
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if name := _SUMS.get(sample.name):
                found[name] = found.get(name, 0.0) + sample.value
            elif name := _MAXIMA.get(sample.name):
                found[name] = max(found.get(name, 0.0), sample.value)
    return found if len(found) == len(_SUMS) + len(_MAXIMA) else {}
