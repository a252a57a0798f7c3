"""A method is three stages with their settings and a site; a `Reducer` is a method with its settings fixed."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ficoco_vllm.kernels import Backend
from ficoco_vllm.reduction.observation import Observation, Observer
from ficoco_vllm.reduction.settings import Settings, combine, parse
from ficoco_vllm.reduction.signals import TOKEN_AXIS, WHY_ABSENT, Signals, partition, take
from ficoco_vllm.reduction.stage import Compression, Correlation, Filter, Stage
from ficoco_vllm.reduction.stages import COMPRESSIONS, CORRELATIONS, FILTERS

Site = Literal["encoder", "features", "decoder"]

# Where a reduction can take place, and which signals a server can measure there; `WHY_ABSENT` gives the reasons.
SITES: Mapping[str, frozenset[str]] = {
    "encoder": frozenset({"visual_attention", "cls_attention", "keys", "features"}),
    "features": frozenset(
        {"visual_attention", "cls_attention", "shallow_cls_attention", "keys", "features", "text_relevance"}
    ),
    "decoder": frozenset({"visual_attention", "text_attention", "keys", "features", "text_features"}),
}
_STAGES: Mapping[str, Mapping[str, Stage]] = {
    "filter": FILTERS,
    "correlate": CORRELATIONS,
    "compress": COMPRESSIONS,
}


@dataclass(frozen=True)
class Method:
    """A reduction method.

    Attributes:
        name: the name in settings and requests.
        title: the name as its authors write it.
        site: "encoder", between attention and MLP of the reducing encoder layers; "features", once, on the
            vision feature output, with the signals of the last executed encoder layer; "decoder", between
            attention and MLP of the reducing decoder layers.
        source: arXiv identifier, or "none".
        filter: decides which tokens leave.
        correlate: decides where their information belongs.
        compress: moves it there.
        own_settings: model of the settings beyond those of the stages.
        summary: what it does, in one line for users; where it is empty, the viewer names the site.
        settings: model of all settings, combined from `own_settings` and those of the stages.
    """

    name: str
    title: str
    site: Site
    source: str
    filter: Filter
    correlate: Correlation
    compress: Compression
    own_settings: type[Settings] = Settings
    summary: str = ""
    settings: type[Settings] = field(init=False)

    def __post_init__(self) -> None:
        stages = (self.filter.settings, self.correlate.settings, self.compress.settings)
        object.__setattr__(self, "settings", combine(f"Settings of {self.name}", self.own_settings, *stages))

    @property
    def num_extra(self) -> int:
        """E, the number of fused tokens that one call appends (none where nothing is removed)."""
        return self.compress.num_extra

    @property
    def merges(self) -> bool:
        """Whether the sizes keep their sum under the default settings."""
        return self.configure().merges

    @property
    def default_schedule(self) -> str:
        """Default distribution of the removals over the reducing layers."""
        known = self.settings.model_fields.get("schedule")
        return "one-shot" if known is None else str(known.default)

    def max_removed(self, num_tokens: int) -> int:
        """The most of `num_tokens` tokens that one call may remove."""
        return self.filter.max_removed(num_tokens)

    def required_signals(self, **settings: Any) -> frozenset[str]:
        """Names of the signals that must be given under these settings."""
        return self.configure(**settings).signals

    def configure(self, **settings: Any) -> "Reducer":
        """Fix the settings, and exchange stages.

        Args:
            **settings: settings of the method. `filter`, `correlate` and `compress` exchange a stage for another one by
                name; the settings of the new stage then replace those of the old one.

        Returns:
            The method, ready to be called. Its `method` is this one, with the stages exchanged.

        Raises:
            ValueError: names each wrong field, its value and the allowed values.
        """
        exchanged: dict[str, Any] = {
            kind: _stage(kind, settings.pop(kind)) for kind in _STAGES if kind in settings
        }
        method = replace(self, **exchanged) if exchanged else self
        return Reducer(method, parse(method.settings, settings, self.name))


class Reduced(NamedTuple):
    """The tokens after one reduction: K kept ones in their order, then E fused ones.

    Attributes:
        tokens: (B, K + E, D), the dtype that came in.
        size: (B, K + E) fp32, number of original patches that each token represents.
        position: (B, K + E) int64 index in the original grid, -1 for a fused token.
    """

    tokens: Tensor
    size: Tensor
    position: Tensor


@dataclass(frozen=True)
class Reducer:
    """A method with its settings fixed: call it once per reducing layer.

    Attributes:
        method: the method, stages exchanged as the settings say.
        settings: its settings, of type `method.settings`.
        correlate: the correlation of the method, or `none` where the compression does not read it.
        signals: names of the signals that must be given.
        merges: whether the sizes keep their sum.
    """

    method: Method
    settings: Settings
    correlate: Correlation = field(init=False)
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

    @property
    def needs_grid(self) -> bool:
        """Whether a stage reads positions in the image's grid."""
        return self.method.filter.needs_grid or self.method.correlate.needs_grid

    def max_removed(self, num_tokens: int) -> int:
        """The most of `num_tokens` tokens that one call may remove."""
        return self.method.max_removed(num_tokens)

    def check_signals(self, offered: Collection[str]) -> None:
        """Check at start-up that all required signals are available.

        Args:
            offered: names of the signals that will be given, for example `SITES[site]`.

        Raises:
            ValueError: one is missing.
        """
        missing = sorted(self.signals.difference(offered))
        if missing:
            given = f"given are: {', '.join(sorted(offered)) or 'none'}"
            lacks = "; ".join(_with_reason(name) for name in missing)
            raise ValueError(f"{self.method.name} needs {lacks}; {given}")

    def __call__(
        self,
        tokens: Tensor,
        signals: Signals,
        num_removed: int,
        size: Tensor | None = None,
        backend: Backend = "torch",
        observer: Observer | None = None,
    ) -> Reduced:
        """Reduce once, without host synchronisation, so that it can be compiled and captured.

        Args:
            tokens: (B, N, D), any floating dtype.
            signals: signals of this layer, N tokens.
            num_removed: R. Zero is the identity.
            size: (B, N) fp32, number of original patches that each token represents; None means one each.
            backend: implementation of the fused ops.
            observer: called with an observation of the reduction, where tokens are removed.

        Returns:
            K + E tokens, K = N - R, in their order.

        Raises:
            ValueError: a required signal is missing, a shape or dtype does not fit, or R is out of range.

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
        redundancy = method.filter(signals, settings, num_removed, backend)
        parts = partition(redundancy, num_removed, backend)
        correlation = self.correlate(signals, parts, settings, backend)
        reduced, new_size = method.compress(tokens, size, parts, correlation, settings, backend)
        position = take(signals.position, parts.target)
        if self.num_extra:
            position = pad(position, (0, self.num_extra), value=-1)
        if observer is not None:
            observer(
                Observation(
                    partition=parts,
                    size=size,
                    correlation=correlation,
                    new_size=new_size,
                    position=position,
                    # Always in torch: kernels are not tuned for unit vectors.
                    compress=lambda *given: method.compress.function(*given, settings),
                )
            )
        return Reduced(reduced, new_size, position)

    def _check(self, tokens: Tensor, signals: Signals, num_removed: int, size: Tensor) -> None:
        N, most = tokens.shape[1], self.max_removed(tokens.shape[1])
        if not 0 <= num_removed <= most:
            raise ValueError(
                f"num_removed = {num_removed}: {self.method.name} removes 0 to {most} of {N} tokens a call"
            )
        if not tokens.is_floating_point():
            raise ValueError(f"tokens have the dtype {tokens.dtype}; allowed: a floating dtype")
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
            if isinstance(value, Tensor) and not _fits(name, value.dtype):
                allowed = "an integer dtype" if name == "position" else "a floating dtype"
                raise ValueError(f"{name} has the dtype {value.dtype}; allowed: {allowed}")


def _fits(name: str, dtype: torch.dtype) -> bool:
    if name == "position":
        return dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
    return dtype.is_floating_point


def _stage(kind: str, name: Any) -> Stage:
    known = _STAGES[kind]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} = {name!r} is not allowed; allowed: {', '.join(sorted(known))}")
    return known[name]


def _with_reason(name: str) -> str:
    why = WHY_ABSENT.get(name)
    return f"the signal `{name}`" + (f" ({why})" if why else "")
