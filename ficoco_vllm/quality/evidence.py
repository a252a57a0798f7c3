"""Bounds on a mean that remain valid under repeated checks, and an alarm for a mean that has fallen.

Scores lie in [0, 1], one for each comparison: 1 where the reduced model answers as the full one. All that is kept of
them is their number and their sum.

Against the claim "the mean is m", each alternative q bets: its wealth is multiplied by (q/m)^x ((1-q)/(1-m))^(1-x) at
a score x. Under the claim the wealth is a supermartingale (for x between 0 and 1 since the logarithm is concave), so
the average over several alternatives exceeds 1/alpha with probability alpha at most, at any time (Ville). The means
that are not rejected form a confidence sequence. With alternatives on one side of m it bounds on that side.

Sources: Robbins, Ann. Math. Stat. 41 (1970) for mixtures; Waudby-Smith and Ramdas, J. R. Stat. Soc. B 86 (2024) for
bets on bounded scores; Shin, Ramdas and Rinaldo, New Engl. J. Stat. Data Sci. 2 (2024) for the alarm, after Shiryaev
and Roberts. The package confseq has the first, but is built from source with Boost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# Alternatives above m, by their distance to 1 in units of 1 - m.
_ABOVE = (0.9, 0.7, 0.5, 0.25, 0.1, 0.0)
# Alternatives below m lie at equal ratios between 1 - m and 1.
NUM_BELOW = 6


@dataclass(frozen=True)
class Tally:
    """Scores of one budget.

    Attributes:
        count: how many.
        total: their sum.
    """

    count: int = 0
    total: float = 0.0

    def plus(self, score: float) -> "Tally":
        """The tally with one more score, of 0 to 1."""
        return Tally(self.count + 1, self.total + score)

    @property
    def mean(self) -> float:
        """Mean of the scores, 1 without any."""
        return self.total / self.count if self.count else 1.0


def evidence_above(tally: Tally, mean: float) -> float:
    """Natural logarithm of the wealth against the claim that the mean is at most `mean`, which lies in (0, 1)."""
    return _log_average([_log_wealth(tally, mean, 1 - far * (1 - mean)) for far in _ABOVE])


def evidence_below(tally: Tally, mean: float) -> float:
    """Natural logarithm of the wealth against the claim that the mean is at least `mean`, which lies in (0, 1)."""
    return _log_average([_log_wealth(tally, mean, other) for other in _below(mean)])


def interval(tally: Tally, confidence: float) -> tuple[float, float]:
    """Confidence sequence of the mean: both bounds hold at all times together.

    Args:
        tally: the scores so far.
        confidence: probability that the interval holds the mean at all times.
    """
    needed = math.log(2 / (1 - confidence))
    low, high = 0.0, 1.0
    if tally.total > 0:
        low = _edge(lambda mean: evidence_above(tally, mean) >= needed, tally.mean)
    if tally.total < tally.count:
        high = 1 - _edge(lambda distance: evidence_below(tally, 1 - distance) >= needed, 1 - tally.mean)
    return low, high


def updated_alarm(alarm: Sequence[float], score: float, target: float) -> tuple[float, ...]:
    """Alarm after one more score: of each alternative, its wealth summed over all moments at which it may have begun.

    While the mean is at least the target, the mean of the entries exceeds a level L once in L scores at most, on
    average.

    Args:
        alarm: before the score, empty at the start.
        score: 0 to 1.
        target: the mean that is claimed.
    """
    before = alarm or (0.0,) * NUM_BELOW
    one = Tally(1, score)
    return tuple(
        (wealth + 1) * math.exp(_log_wealth(one, target, other))
        for wealth, other in zip(before, _below(target), strict=True)
    )


def settled_alarm(target: float) -> float:
    """Mean of the alarm's entries that many scores of 1 lead to."""
    factors = [other / target for other in _below(target)]
    return sum(factor / (1 - factor) for factor in factors) / NUM_BELOW


def _below(mean: float) -> list[float]:
    return [1 - (1 - mean) ** (step / (NUM_BELOW + 1)) for step in range(1, NUM_BELOW + 1)]


def _log_wealth(tally: Tally, mean: float, other: float) -> float:
    missing = tally.count - tally.total
    lost = 0.0
    if missing > 0:
        if other >= 1:
            return -math.inf
        lost = missing * math.log((1 - other) / (1 - mean))
    return tally.total * math.log(other / mean) + lost


def _log_average(logs: Sequence[float]) -> float:
    most = max(logs)
    return most + math.log(sum(math.exp(value - most) for value in logs) / len(logs))


def _edge(rejected: Callable[[float], bool], mean: float) -> float:
    """The largest rejected value below the mean: values farther from it are rejected as well."""
    low, high = 0.0, mean
    for _ in range(50):
        middle = (low + high) / 2
        if 0 < middle < 1 and rejected(middle):
            low = middle
        else:
            high = middle
    return low
