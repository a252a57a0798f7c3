"""Growth of memory over the rounds of a soak test."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.harness.results import Bar, at_most

# Caches fill and pools grow during this share of the requests, each of which is sent many times.
WARM_UP_SHARE = 1 / 3
# Fewer rounds after the warm-up do not show a slope.
LEAST_ROUNDS = 10


def growth_bars(name: str, rounds: Sequence[Mapping[str, Any]], memory: str, limit: float) -> list[Bar]:
    """The bar on MiB for a thousand requests after the warm-up, if there are enough rounds.

    Each round has `num_requests` so far, and the memory in MiB, whose name is `memory`.
    """
    later = [row for row in rounds if row["num_requests"] > WARM_UP_SHARE * rounds[-1]["num_requests"]]
    if len(later) < LEAST_ROUNDS:
        return []
    thousands = [row["num_requests"] / 1000 for row in later]
    slope = statistics.linear_regression(thousands, [row[memory] for row in later]).slope
    return [at_most(name, slope, limit)]
