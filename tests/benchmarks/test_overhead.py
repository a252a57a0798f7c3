"""What `make bench-metrics` makes of its pairs: a cost that is there is seen, one that is not is none."""

import random

from benchmarks.metrics.paired import Overhead


def pairs(percent: float, noise: float, count: int = 80) -> list[tuple[float, float]]:
    """Slices whose machine slows down by a half on the way, with so much noise of their own."""
    generator = random.Random(0)
    found = []
    for index in range(count):
        base = 1 + 0.5 * index / count
        parts = [base * generator.gauss(1, noise) for _ in range(2)]
        found.append((parts[0] * (1 + percent / 100), parts[1]))
    return found


def test_a_planted_cost_is_seen() -> None:
    found = Overhead.of(pairs(3, 0.02))
    assert found.low_percent < 3 < found.high_percent
    assert found.noise_percent < 1
    assert found.beyond_noise_percent > 1


def test_no_cost_is_none() -> None:
    assert Overhead.of(pairs(0, 0.02)).beyond_noise_percent == 0
    assert Overhead.of(pairs(3, 0.3)).noise_percent > 5
