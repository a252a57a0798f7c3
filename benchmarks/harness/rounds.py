"""Rows of a benchmark measured in turns, round by round, so that a busy machine slows all of them equally."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

# OpenMP's threads spin for 0.2 s after their work, on the core that the other engine then needs.
SETTLE_SECONDS = 0.4
Sample = dict[str, float]


def take_turns(
    asks: Mapping[str, Callable[[int], Sample]], rounds: int, order: random.Random, label: str
) -> dict[str, list[Sample]]:
    """Measure each row once a round, in random order; the first round warms up and is not counted.

    A row's measurement takes a seed and returns `ttft_seconds` and other figures.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in asks}
    for round_index in range(-1, rounds):
        for name in order.sample(list(asks), len(asks)):
            time.sleep(SETTLE_SECONDS)
            sample = asks[name](order.getrandbits(32))
            if round_index >= 0:
                samples[name].append(sample)
                print(f"{label}, round {round_index}, {name}: {sample['ttft_seconds']:.3f} s", flush=True)
    return samples


def ratios(base: Sequence[float], values: Sequence[float]) -> list[float]:
    """Speed-up of each round: time of the base over time of the row."""
    return [before / after for before, after in zip(base, values, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def ranged(figures: Mapping[str, float], name: str = "", digits: int = 2) -> str:
    """Median and range as text, from `median`, `min` and `max` after a prefix."""
    middle, low, high = (figures[f"{name}{which}"] for which in ("median", "min", "max"))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"
