"""Confidence intervals and tests of shares and differences."""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
# Bounds of shares are multiples of 1 / _STEPS, as fine as floating point.
_STEPS = 2**53
RESAMPLES = 4000


def wilson(successes: int, count: int) -> tuple[float, float]:
    """95% confidence interval of a share.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927).
    """
    share, z = successes / count, 1.959964  # z: the normal distribution's quantile of 97.5%
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def lower_bound(successes: int, count: int, confidence: float = CONFIDENCE) -> float:
    """One-sided exact lower bound: the share below which so many successes would be rarer than 1 - confidence.

    Source: Clopper and Pearson, Biometrika 26 (1934).
    """
    chance = partial(at_least, successes, count)
    return bisect_left(range(1, _STEPS), 1 - confidence, key=lambda step: chance(step / _STEPS)) / _STEPS


def upper_bound(successes: int, count: int, confidence: float = CONFIDENCE) -> float:
    """The one-sided exact upper bound of a share; see `lower_bound`."""
    return 1.0 - lower_bound(count - successes, count, confidence)


def at_least(successes: int, count: int, share: float) -> float:
    """Probability of so many successes or more, each with the probability `share`, which is neither 0 nor 1."""
    k = np.arange(successes, count + 1)
    logs = _log_choices(count)[successes:] + k * math.log(share) + (count - k) * math.log1p(-share)
    return min(1.0, float(np.exp(logs).sum()))


@lru_cache(maxsize=1024)
def _log_choices(count: int) -> NDArray[np.float64]:
    """Logarithms of the binomial coefficients of `count` over 0 to `count`."""
    logs = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    return np.asarray(logs[-1] - logs - logs[::-1])


def sign_test(better: int, worse: int) -> float:
    """Two-sided exact probability of so unequal a split of questions that only one of two answers got right.

    Source: McNemar, Psychometrika 12 (1947), exact form.
    """
    return min(1.0, 2 * at_least(max(better, worse), better + worse, 0.5))


def paired_bootstrap(
    full: Mapping[str, Sequence[bool]], reduced: Mapping[str, Sequence[bool]]
) -> tuple[float, float, float]:
    """Difference of two accuracies on the same questions, each type weighing the same.

    Questions are resampled within their type, both answers to a question together. A resample of differences that
    are -1, 0 or 1 is a draw from the multinomial distribution of their counts, so none is written out.

    Returns:
        The gain from `full` to `reduced`, each the type of question to whether each was answered right, and the bounds
        of its 95% percentile interval, in shares of 1.
    """
    rng = np.random.default_rng(0)
    total, draws = 0.0, np.zeros(RESAMPLES)
    for kind, before in full.items():
        after = reduced[kind]
        gained = sum(b > a for a, b in zip(before, after, strict=True))
        lost = sum(b < a for a, b in zip(before, after, strict=True))
        n = len(before)
        counts = rng.multinomial(n, [gained / n, lost / n, 1 - (gained + lost) / n], size=RESAMPLES)
        total += (gained - lost) / n
        draws += (counts[:, 0] - counts[:, 1]) / n
    low, high = np.quantile(draws / len(full), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return total / len(full), float(low), float(high)
