"""A stage: one function with its knobs and the signals that it reads."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.reduction.ops import Ops
from ficoco_vllm.reduction.settings import Settings

SignalNames = frozenset[str]


def all_but_one(num_tokens: int) -> int:
    """The most tokens that one call may remove: at least one must stay."""
    return max(num_tokens - 1, 0)


@dataclass(frozen=True)
class Stage:
    """One of the three steps of a reduction.

    Attributes:
        function: `filter(signals, settings)`, `correlate(signals, partition, settings)` or
            `compress(tokens, size, partition, correlation, settings)`.
        signals: names of the signals it reads, or a function of the settings that tells them.
        settings: its knobs.
        sized: a filter only: it is also told `num_removed`, as its last argument. For selections that place a
            given number of tokens (greedy picks, grids).
        max_removed: a filter only: the most tokens that it can let go at once, out of so many.
        partners: a correlation only: the filters with which every source has a target; None means all. With
            any other filter a source may have none, and is lost.
        signed: a correlation only: it may be negative.
        num_extra: a compression only: E, how many fused tokens it appends.
        merges: a compression only: the sizes of the tokens keep their sum, given that every source has a
            target. A bool or a function of the settings.
        positive: a compression only: a source flows into targets of positive correlation alone, and is lost where it
            has none.
        correlated: a compression only: it reads the correlation. Where it does not, none is computed and the
            signals of the correlation are not needed. A bool or a function of the settings.
        fused: it is also handed `ops`, the implementation of its heavy step, by that keyword.
    """

    function: Callable[..., Any]
    signals: SignalNames | Callable[[Any], SignalNames] = frozenset()
    settings: type[Settings] = Settings
    sized: bool = False
    max_removed: Callable[[int], int] = all_but_one
    partners: tuple[Callable[..., Any], ...] | None = None
    signed: bool = False
    num_extra: int = 0
    merges: bool | Callable[[Any], bool] = False
    positive: bool = False
    correlated: bool | Callable[[Any], bool] = True
    fused: bool = False

    def __call__(self, ops: Ops, *arguments: Any) -> Any:
        """Run the function.

        Args:
            ops: handed on where the function takes them.
            *arguments: of the function.
        """
        return self.function(*arguments, ops=ops) if self.fused else self.function(*arguments)

    def required_signals(self, settings: Settings) -> SignalNames:
        """Names of the signals that the function reads under these settings."""
        return self.signals(settings) if callable(self.signals) else self.signals

    def conserves_size(self, settings: Settings) -> bool:
        """Whether a compression keeps the sum of the sizes under these settings."""
        return self.merges(settings) if callable(self.merges) else self.merges

    def reads_correlation(self, settings: Settings) -> bool:
        """Whether a compression reads the correlation under these settings."""
        return self.correlated(settings) if callable(self.correlated) else self.correlated
