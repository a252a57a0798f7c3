"""What a method is: three stages, their settings, and where in the model it works."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ficoco_vllm.reduction.settings import Settings, parse
from ficoco_vllm.reduction.signals import TOKEN_AXIS, Signals, partition, take
from ficoco_vllm.reduction.stages import CORRELATIONS, Stage

Site = Literal["encoder", "features", "decoder"]
SITES: tuple[Site, ...] = ("encoder", "features", "decoder")


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


def all_but_one(num_tokens: int) -> int:
    """The most tokens that one call may remove: at least one must stay."""
    return max(num_tokens - 1, 0)


@dataclass(frozen=True)
class Method:
    """A reduction method by name.

    Attributes:
        name: as users write it.
        title: as its authors write it.
        site: "encoder", between attention and MLP of the reducing encoder layers; "features", on the vision
            feature output, with the signals of the last executed encoder layer; "decoder", between
            attention and MLP of the reducing decoder layers.
        source: arXiv identifier.
        settings: the pydantic model of its settings.
        filter: first stage.
        correlate: second stage.
        compress: third stage.
        max_removed: the most tokens that one call may remove out of so many.
    """

    name: str
    title: str
    site: Site
    source: str
    settings: type[Settings]
    filter: Stage
    correlate: Stage
    compress: Stage
    max_removed: Callable[[int], int] = all_but_one

    @property
    def num_extra(self) -> int:
        """E, how many fused tokens one call appends (none where nothing is removed)."""
        return self.compress.num_extra

    @property
    def merges(self) -> bool:
        """Whether the sizes keep their sum under the default settings."""
        return self.configure().merges

    @property
    def default_schedule(self) -> str:
        """How removals are spread over the reducing layers unless the settings say otherwise."""
        known = self.settings.model_fields.get("schedule")
        return "one-shot" if known is None else str(known.default)

    def required_signals(self, **settings: Any) -> frozenset[str]:
        """Names of the signals that must be given under these settings."""
        return self.configure(**settings).signals

    def configure(self, **settings: Any) -> "Reducer":
        """Fix the settings.

        Raises:
            ValueError: naming each wrong field, its value and what is allowed.
        """
        return Reducer(self, parse(self.settings, settings, self.name))


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

    method: Method
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
        object.__setattr__(self, "merges", method.compress.conserves_size(settings))

    @property
    def num_extra(self) -> int:
        """E, how many fused tokens one call appends (none where nothing is removed)."""
        return self.method.num_extra

    def __call__(
        self, tokens: Tensor, signals: Signals, num_removed: int, size: Tensor | None = None
    ) -> Reduced:
        """Reduce once. No host synchronisation, so it may be compiled and captured.

        Args:
            tokens: (B, N, D), any floating dtype.
            signals: of this layer, N tokens.
            num_removed: R. Zero is the identity.
            size: (B, N) fp32, how many original patches each token stands for; None means one each.

        Returns:
            K + E tokens, K = N - R, in their order.

        Raises:
            ValueError: a required signal is missing, a shape does not fit, or R is out of range.

        Source: arXiv:2411.17686, Alg. 1 and 2.
        """
        if size is None:
            size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32)
        self._check(tokens, signals, num_removed, size)
        if num_removed == 0:
            return Reduced(tokens, size, signals.position)
        if signals.features is None:
            signals = replace(signals, features=tokens)
        method, settings = self.method, self.settings
        if method.filter.sized:
            redundancy = method.filter.function(signals, settings, num_removed)
        else:
            redundancy = method.filter.function(signals, settings)
        parts = partition(redundancy, num_removed)
        correlation = self.correlate.function(signals, parts, settings)
        reduced, new_size = method.compress.function(tokens, size, parts, correlation, settings)
        position = pad(take(signals.position, parts.target), (0, self.num_extra), value=-1)
        return Reduced(reduced, new_size, position)

    def _check(self, tokens: Tensor, signals: Signals, num_removed: int, size: Tensor) -> None:
        name, most = self.method.name, self.method.max_removed(tokens.shape[1])
        if not 0 <= num_removed <= most:
            raise ValueError(
                f"num_removed = {num_removed}: {name} removes 0 to {most} of {tokens.shape[1]} tokens a call"
            )
        given = {"position": signals.position, "size": size}
        for key in sorted(self.signals):
            value = getattr(signals, key)
            if value is not None:
                given[key] = value
            elif key != "features":  # these default to the tokens
                raise ValueError(f"{name} needs the signal `{key}`, which was not given")
        for key, value in given.items():
            axis = TOKEN_AXIS.get(key, 1)
            if value.shape[0] != tokens.shape[0] or (axis and value.shape[axis] != tokens.shape[1]):
                raise ValueError(
                    f"{key} has shape {tuple(value.shape)}, which does not fit tokens {tuple(tokens.shape)}"
                )
