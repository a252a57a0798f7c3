"""Translation of the field `ficoco` into arguments for the image processor and the decoder: integers and names."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, Literal

from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.request_fields import KEEP, METHOD
from ficoco_vllm.server.request_field.schema import FIELD, OFF, FicocoRequest


@dataclass(frozen=True)
class Bounds:
    """The operator's bounds on method and budget. Every check raises ValueError: field, value, what is allowed.

    Attributes:
        min_keep: fewest visual tokens of an image.
        methods: allowed names, "off" among them; None allows every method that the server can run.
    """

    min_keep: int = 1
    methods: tuple[str, ...] | None = None

    @property
    def allows_off(self) -> bool:
        """Whether a request may keep all visual tokens."""
        return self.methods is None or OFF in self.methods

    def check_keep(self, name: str, keep: float, max_keep: int) -> None:
        """Refuse a budget outside of the bounds."""
        if not self.min_keep <= keep <= max_keep:
            raise ValueError(
                f"{name} = {keep} is not allowed; allowed: an integer from {self.min_keep} to {max_keep}"
            )
        self.check_reduces(name, keep, max_keep)

    def check_reduces(self, name: str, keep: Any, max_keep: int) -> None:
        """Refuse a budget of all tokens where "off" is not allowed."""
        if keep == max_keep and not self.allows_off:
            raise ValueError(
                f"{name} = {keep} is not allowed; allowed: fewer than all, which would be {OFF!r}; the server "
                f"reduces by {', '.join(self.methods or ())}"
            )

    def check_method(self, name: str, method: Any) -> None:
        """Refuse a method that the operator does not allow."""
        if self.methods is not None and method not in self.methods:
            raise ValueError(f"{name} = {method!r} is not allowed; allowed: {', '.join(self.methods)}")


# Bounds where the operator sets none.
UNBOUNDED = Bounds()


@dataclass(frozen=True)
class Resolved:
    """Method and budget of one request, as its processor and decoder read them.

    Attributes:
        tower: our part of `mm_processor_kwargs`.
        decoder: our part of `vllm_xargs`.
    """

    tower: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolver:
    """Resolves the requests of one server.

    Attributes:
        plan: where the server's method reduces.
        bounds: the operator's bounds.
    """

    plan: ServerPlan
    bounds: Bounds

    @property
    def max_keep(self) -> int:
        """Visual tokens of an image without reduction, or of a tile where a budget counts these."""
        return self.plan.most

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Methods that a request may name."""
        config = self.plan.config
        if config.method in PIPELINES:
            names: tuple[str, ...] = (str(config.method),)
        elif self.plan.decoder is not None:
            names = self.plan.decoder.methods
        else:
            names = self.plan.tower.methods
        return tuple(name for name in names if self.bounds.methods is None or name in self.bounds.methods)

    def resolve(self, requested: FicocoRequest | Literal["off"]) -> Resolved:
        """Translate the field of a request.

        Args:
            requested: the field, parsed.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        tower, decoder = self.plan.tower, self.plan.decoder
        if isinstance(requested, str):
            self.bounds.check_method(FIELD, OFF)
            return Resolved(
                tower={KEEP: tower.most_keep} if tower.active else {},
                decoder={} if decoder is None else {KEEP: self.max_keep + tower.shape.with_cls},
            )
        if requested.method is not None and requested.method not in self.methods:
            allowed = (*self.methods, OFF) if self.bounds.allows_off else self.methods
            raise ValueError(
                f"{FIELD}.method = {requested.method!r} is not allowed; allowed: {', '.join(allowed)}"
            )
        # A pipeline has its own methods; its name selects nothing in a request.
        method = None if self.plan.config.method in PIPELINES else requested.method
        named = {} if method is None else {METHOD: method}
        keep = requested.keep
        if requested.kv_budget is not None:
            keep = self._keep_of(method, requested.kv_budget)
        if keep is None:
            return Resolved(named) if decoder is None else Resolved(decoder=named)
        self.bounds.check_keep(f"{FIELD}.keep", keep, self.max_keep)
        if decoder is None:
            return Resolved({**named, KEEP: keep})
        entering, in_tower = self._entering(keep)
        return Resolved(in_tower, {**named, KEEP: min(keep, entering)})

    def check_raw(self, name: str, values: Mapping[str, Any], entering: int | None = None) -> None:
        """Check method and budget in vLLM's own extension fields against the operator's bounds.

        Values that no server allows are refused later, by the processor and the decoder.

        Args:
            name: field of the body, `mm_processor_kwargs` or `vllm_xargs`.
            values: its value.
            entering: visual tokens of the largest image that enter the decoder; keeping all of them is allowed, however
                few they are.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        keep, min_keep = values.get(KEEP), self.bounds.min_keep
        if entering is not None:
            min_keep = min(min_keep, entering)
        if isinstance(keep, int | float) and 1 <= keep < min_keep:
            self.bounds.check_keep(f"{name}.{KEEP}", keep, self.max_keep)
        method = values.get(METHOD)
        config = self.plan.config
        own = (config.method, config.decoder_method.name if config.decoder_method else None)
        if method is not None and method not in own:
            self.bounds.check_method(f"{name}.{METHOD}", method)

    def _entering(self, keep: int) -> tuple[int, dict[str, Any]]:
        """Visual tokens that enter the decoder for a budget, and the arguments of the tower that lead there."""
        plan = self.plan
        if not plan.tower_follows:
            return plan.tower.num_output_tokens(plan.tower.default), {}
        tower_keep = plan.tower_keep(keep)
        return plan.tower.num_output_tokens(plan.tower.budget(None, tower_keep)), {KEEP: tower_keep}

    def _keep_of(self, method: str | None, kv_budget: float) -> int:
        """The largest `keep` whose KV cache, averaged over the layers, is no larger than the budget."""
        decoder = self.plan.decoder

        def mean(keep: int) -> float:
            if decoder is None:
                return keep
            entering, _ = self._entering(keep)
            return fmean(decoder.counts(method or decoder.method, entering, min(keep, entering)))

        smallest, largest = mean(self.bounds.min_keep), mean(self.max_keep)
        if not smallest <= kv_budget <= largest:
            raise ValueError(
                f"{FIELD}.kv_budget = {kv_budget:g} is not allowed; allowed: {smallest:.2f} to {largest:.2f}"
            )
        return bisect_right(range(1, self.max_keep + 1), kv_budget, key=mean)
