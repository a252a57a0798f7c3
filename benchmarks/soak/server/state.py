"""State of a server: its gauges and counters, and the memory of its processes."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress

import psutil

from ficoco_vllm.benchmarks.harness.http import samples

_MIB = 2**20
QUEUE = "vllm:num_requests_waiting"
# Must be 0 in a server without requests.
GAUGES = (
    "vllm:num_requests_running",
    QUEUE,
    "vllm:kv_cache_usage_perc",
    "ficoco:kv_blocks_held",
    "ficoco:kv_blocks_saved",
)
# Requests that ended, by the label that says how.
ENDED = {"vllm:request_success_total": "finished_reason", "ficoco:requests_total": "outcome"}
RESPONSES = "http_requests_total"
PREEMPTIONS = "vllm:num_preemptions_total"

Counts = dict[str, dict[str, float]]


def read_gauges(text: str) -> dict[str, float]:
    """Each of `GAUGES`, added up over its labels."""
    totals = dict.fromkeys(GAUGES, 0.0)
    for sample in samples(text):
        if sample.name in totals:
            totals[sample.name] += sample.value
    return totals


def read_counts(text: str) -> Counts:
    """Counters of requests by how they ended, of responses by their class of status, and of preemptions."""
    labels = {**ENDED, RESPONSES: "status", PREEMPTIONS: ""}
    totals: Counts = {name: defaultdict(float) for name in labels}
    for sample in samples(text):
        if sample.name in labels:
            totals[sample.name][sample.labels.get(labels[sample.name], "")] += sample.value
    return totals


def difference(after: Counts, before: Counts) -> Counts:
    """Counts between two looks."""
    return {
        name: {label: value - before[name].get(label, 0.0) for label, value in values.items()}
        for name, values in after.items()
    }


def total(counts: Mapping[str, float], *labels: str) -> float:
    """Sum over some labels."""
    return sum(counts.get(label, 0.0) for label in labels)


def tree_mib(pid: int) -> float:
    """Memory of a process and its descendants, MiB; shared pages count once (PSS)."""
    num_bytes = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                num_bytes += process.memory_full_info().pss
    return num_bytes / _MIB
