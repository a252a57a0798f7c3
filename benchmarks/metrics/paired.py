"""With against without, slice by slice: what the pairs say in the middle, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log, sqrt
from statistics import median

# Two-sided 95% of the normal distribution, to which the binomial one of ranks comes close.
CONFIDENCE = 1.96


@dataclass(frozen=True)
class Slice:
    """What one server did with one share of the requests, from the first one sent to the last one answered.

    Attributes:
        seconds: of the clock.
        cpu_seconds: of all of the server's processes.
    """

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Overhead:
    """With against without, in percent of without.

    Attributes:
        percent: how much more, the median over the pairs.
        low_percent: lower end of its 95% interval, a rank of the pairs: no shape of their noise is assumed.
        high_percent: upper end.
    """

    percent: float
    low_percent: float
    high_percent: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> "Overhead":
        """Compare.

        Args:
            pairs: with and without, of the same requests one after the other; ten at least.
        """
        ratios = sorted(100 * log(with_ours / without) for with_ours, without in pairs)
        rank = floor((len(ratios) - CONFIDENCE * sqrt(len(ratios))) / 2)
        return cls(median(ratios), ratios[rank - 1], ratios[-rank])

    @property
    def noise_percent(self) -> float:
        """Half of the interval."""
        return (self.high_percent - self.low_percent) / 2

    @property
    def beyond_noise_percent(self) -> float:
        """What is there of it at least; 0 where the noise covers it."""
        return max(0.0, self.low_percent)
