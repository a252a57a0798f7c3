"""The three kinds of stages: a function with its settings and the signals that it reads.

A stage's function is called with the arguments given at its class. It may also declare a parameter `backend`
(`ficoco_vllm.kernels.Backend`, the implementation of the fused ops) and, in a filter, `num_removed`; both are passed
by keyword to functions that declare them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from torch import Tensor

from ficoco_vllm.kernels import Backend
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals


def all_but_one(num_tokens: int) -> int:
    """The most tokens that one call may remove: at least one must stay."""
    return max(num_tokens - 1, 0)


@dataclass(frozen=True)
class Stage:
    """Base of the three kinds.

    Attributes:
        function: computes the stage. Its name is the name of the stage.
        signals: names of the signals that it reads, or a function of the settings that returns them.
        settings: the model of its settings.
    """

    function: Callable[..., Any]
    signals: frozenset[str] | Callable[[Any], frozenset[str]] = frozenset()
    settings: type[Settings] = Settings
    _optional: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        optional = signature(self.function).parameters.keys() & {"backend", "num_removed"}
        object.__setattr__(self, "_optional", frozenset(optional))

    @property
    def name(self) -> str:
        """The name by which settings select the stage."""
        return self.function.__name__

    def required_signals(self, settings: Settings) -> frozenset[str]:
        """Names of the signals that the function reads under these settings."""
        return self.signals(settings) if callable(self.signals) else self.signals

    def _call(self, *arguments: Any, **optional: Any) -> Any:
        known = {name: value for name, value in optional.items() if name in self._optional}
        return self.function(*arguments, **known)


@dataclass(frozen=True)
class Filter(Stage):
    """Choice of the tokens to remove: `function(signals, settings)` returns the redundancy (B, N), higher leaves first.

    Attributes:
        max_removed: the most tokens that one call can remove, as a function of their number.
        needs_grid: whether it reads positions in the image's grid, which are unknown in the decoder.
    """

    max_removed: Callable[[int], int] = all_but_one
    needs_grid: bool = False

    def __call__(
        self, signals: Signals, settings: Settings, num_removed: int, backend: Backend = "torch"
    ) -> Tensor:
        """Redundancy (B, N), fp32 or fp64."""
        scores: Tensor = self._call(signals, settings, num_removed=num_removed, backend=backend)
        return scores


@dataclass(frozen=True)
class Correlation(Stage):
    """Targets of the information: `function(signals, partition, settings)` returns C (B, R, K).

    Attributes:
        needs_grid: whether it reads positions in the image's grid, which are unknown in the decoder.
        partners: the filters with which every source has a target; None means all. With any other filter a source
            may have none, and is lost.
        signed: whether it may be negative.
    """

    needs_grid: bool = False
    partners: tuple[Callable[..., Any], ...] | None = None
    signed: bool = False

    def __call__(
        self, signals: Signals, partition: Partition, settings: Settings, backend: Backend = "torch"
    ) -> Tensor:
        """C (B, R, K) fp32."""
        correlation: Tensor = self._call(signals, partition, settings, backend=backend)
        return correlation


@dataclass(frozen=True)
class Compression(Stage):
    """Merge of sources into targets: `function(tokens, size, partition, correlation, settings)` returns tokens, sizes.

    Attributes:
        num_extra: E, number of fused tokens that it appends.
        merges: whether the sizes of the tokens keep their sum, given that every source has a target. A bool or a
            function of the settings.
        positive: whether a source flows only into targets of positive correlation, and is lost without any.
        correlated: whether it reads the correlation. If not, none is computed and the signals of the correlation are
            not needed. A bool or a function of the settings.
    """

    num_extra: int = 0
    merges: bool | Callable[[Any], bool] = False
    positive: bool = False
    correlated: bool | Callable[[Any], bool] = True

    def __call__(
        self,
        tokens: Tensor,
        size: Tensor,
        partition: Partition,
        correlation: Tensor,
        settings: Settings,
        backend: Backend = "torch",
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, K + E, D) and sizes (B, K + E)."""
        reduced: tuple[Tensor, Tensor] = self._call(
            tokens, size, partition, correlation, settings, backend=backend
        )
        return reduced

    def conserves_size(self, settings: Settings) -> bool:
        """Whether the sizes keep their sum under these settings."""
        return self.merges(settings) if callable(self.merges) else self.merges

    def reads_correlation(self, settings: Settings) -> bool:
        """Whether the correlation is read under these settings."""
        return self.correlated(settings) if callable(self.correlated) else self.correlated
