"""A method with its settings fixed: filter, partition, correlate, compress."""

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ficoco_vllm.reduction.observation import Observation, Observer
from ficoco_vllm.reduction.ops import TORCH, Ops
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import TOKEN_AXIS, WHY_ABSENT, Signals, partition, take
from ficoco_vllm.reduction.stages import CORRELATIONS, Stage

if TYPE_CHECKING:
    from ficoco_vllm.reduction.method import Method


class Reduced(NamedTuple):
    """The tokens after one reduction, K kept ones in their order and E fused ones behind them.

    Attributes:
        tokens: (B, K + E, D), the dtype that came in.
        size: (B, K + E) fp32, how many original patches each token stands for.
        position: (B, K + E) int64 index in the original grid, -1 for a fused token.
    """

    tokens: Tensor
    size: Tensor
    position: Tensor


@dataclass(frozen=True)
class Reducer:
    """A method with its settings fixed: call it once per reducing layer.

    Attributes:
        method: the method.
        settings: its settings, of type `method.settings`.
        correlate: the correlation of the method, or none where the compression does not read it.
        signals: names of the signals that must be given.
        merges: whether the sizes keep their sum.
    """

    method: "Method"
    settings: Settings
    correlate: Stage = field(init=False)
    signals: frozenset[str] = field(init=False)
    merges: bool = field(init=False)

    def __post_init__(self) -> None:
        method, settings = self.method, self.settings
        correlates = method.compress.reads_correlation(settings)
        correlate = method.correlate if correlates else CORRELATIONS["none"]
        needed = method.filter.required_signals(settings) | correlate.required_signals(settings)
        object.__setattr__(self, "correlate", correlate)
        object.__setattr__(self, "signals", needed)
        partners = correlate.partners
        complete = not correlates or partners is None or method.filter.function in partners
        complete = complete and not (correlate.signed and method.compress.positive)
        object.__setattr__(self, "merges", complete and method.compress.conserves_size(settings))

    @property
    def num_extra(self) -> int:
        """E, how many fused tokens one call appends (none where nothing is removed)."""
        return self.method.num_extra

    def max_removed(self, num_tokens: int) -> int:
        """The most tokens that one call may remove out of so many."""
        return self.method.max_removed(num_tokens)

    def check_signals(self, offered: Collection[str]) -> None:
        """Find out at start-up whether all signals can be had.

        Args:
            offered: names of the signals that will be given, for example `SITES[site]`.

        Raises:
            ValueError: one is missing.
        """
        missing = sorted(self.signals.difference(offered))
        if missing:
            given = f"given are: {', '.join(sorted(offered)) or 'none'}"
            lacks = "; ".join(self._lacks(name) for name in missing)
            raise ValueError(f"{self.method.name} needs {lacks}; {given}")

    def _lacks(self, name: str) -> str:
        why = WHY_ABSENT.get(name)
        return f"the signal `{name}`" + (f" ({why})" if why else "")

    def __call__(
        self,
        tokens: Tensor,
        signals: Signals,
        num_removed: int,
        size: Tensor | None = None,
        ops: Ops = TORCH,
        observer: Observer | None = None,
    ) -> Reduced:
        """Reduce once. No host synchronisation, so it may be compiled and captured.

        Args:
            tokens: (B, N, D), any floating dtype.
            signals: of this layer, N tokens.
            num_removed: R. Zero is the identity.
            size: (B, N) fp32, how many original patches each token stands for; None means one each.
            ops: the implementation of the heavy steps.
            observer: is shown what was done, where tokens are removed.

        Returns:
            K + E tokens, K = N - R, in their order.

        Raises:
            ValueError: a required signal is missing, a shape does not fit, or R is out of range.

        Source: arXiv:2411.17686, Alg. 1 and 2.
        """
        if size is None:
            size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        if signals.features is None:
            signals = replace(signals, features=tokens)
        self._check(tokens, signals, num_removed, size)
        if num_removed == 0:
            return Reduced(tokens, size, signals.position)
        method, settings = self.method, self.settings
        count = (num_removed,) if method.filter.sized else ()
        redundancy = method.filter(ops, signals, settings, *count)
        parts = partition(redundancy, num_removed, ops)
        correlation = self.correlate(ops, signals, parts, settings)
        reduced, new_size = method.compress(ops, tokens, size, parts, correlation, settings)
        position = pad(take(signals.position, parts.target), (0, self.num_extra), value=-1)
        if observer is not None:
            observer(
                Observation(
                    partition=parts,
                    size=size,
                    correlation=correlation,
                    new_size=new_size,
                    position=position,
                    # In torch, whatever `ops` served: unit vectors are not a shape that kernels are tuned for.
                    compress=lambda *what: method.compress.function(*what, settings),
                )
            )
        return Reduced(reduced, new_size, position)

    def _check(self, tokens: Tensor, signals: Signals, num_removed: int, size: Tensor) -> None:
        N, most = tokens.shape[1], self.max_removed(tokens.shape[1])
        if not 0 <= num_removed <= most:
            raise ValueError(
                f"num_removed = {num_removed}: {self.method.name} removes 0 to {most} of {N} tokens a call"
            )
        given = {"position": signals.position, "size": size}
        given |= {name: getattr(signals, name) for name in sorted(self.signals)}
        for name, value in given.items():
            if value is None:
                raise ValueError(f"{self.method.name} needs the signal `{name}`, which was not given")
            axis = TOKEN_AXIS.get(name, 1)
            if value.shape[0] != tokens.shape[0] or (axis and value.shape[axis] != N):
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}, which does not fit tokens {tuple(tokens.shape)}"
                )
