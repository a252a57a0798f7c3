"""From what a request asks to what processor and decoder are told: pure integers and names."""

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
    """What the operator lets requests ask for.

    Attributes:
        min_keep: fewest visual tokens of an image.
        methods: names, "off" among them; None allows all that the server can run.
    """

    min_keep: int = 1
    methods: tuple[str, ...] | None = None

    def check_keep(self, name: str, keep: float, most: int) -> None:
        """Refuse a budget that is out of bounds.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if not self.min_keep <= keep <= most:
            raise ValueError(
                f"{name} = {keep} is not allowed; allowed: an integer from {self.min_keep} to {most}"
            )

    def check_method(self, name: str, method: Any) -> None:
        """Refuse a method that the operator does not allow.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.methods is not None and method not in self.methods:
            raise ValueError(f"{name} = {method!r} is not allowed; allowed: {', '.join(self.methods)}")

    def check_reduced(self, name: str, keep: Any, most: int) -> None:
        """Refuse a budget of all tokens where the operator does not allow "off".

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.methods is not None and OFF not in self.methods and keep == most:
            raise ValueError(
                f"{name} = {keep} is not allowed; allowed: fewer than all, which would be {OFF!r}; the server "
                f"reduces by {', '.join(self.methods)}"
            )


# An operator who sets no bounds.
UNBOUNDED = Bounds()


@dataclass(frozen=True)
class Told:
    """What goes on with a request.

    Attributes:
        tower: `mm_processor_kwargs` of ours.
        decoder: `vllm_xargs` of ours.
    """

    tower: Mapping[str, Any] = field(default_factory=dict)
    decoder: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolver:
    """Of one server.

    Attributes:
        plan: of the server.
        bounds: of the operator.
    """

    plan: ServerPlan
    bounds: Bounds

    @property
    def most(self) -> int:
        """Visual tokens of an image without any reduction, or of a tile of it where these are counted."""
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

    def tell(self, asked: FicocoRequest | Literal["off"]) -> Told:
        """What processor and decoder are told.

        Args:
            asked: by the request.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        tower, decoder = self.plan.tower, self.plan.decoder
        if isinstance(asked, str):
            self.bounds.check_method(FIELD, OFF)
            return Told(
                tower={KEEP: tower.most_keep} if tower.active else {},
                decoder={} if decoder is None else {KEEP: self.most + tower.shape.with_cls},
            )
        if asked.method is not None and asked.method not in self.methods:
            off = self.bounds.methods is None or OFF in self.bounds.methods
            allowed = (*self.methods, OFF) if off else self.methods
            raise ValueError(
                f"{FIELD}.method = {asked.method!r} is not allowed; allowed: {', '.join(allowed)}"
            )
        method = None if self.plan.config.method in PIPELINES else asked.method
        named = {} if method is None else {METHOD: method}
        keep = asked.keep
        if asked.kv_budget is not None:
            keep = self._keep_of(method, asked.kv_budget)
        if keep is None:
            return Told({}, named) if decoder is not None else Told(named)
        self.bounds.check_keep(f"{FIELD}.keep", keep, self.most)
        self.bounds.check_reduced(f"{FIELD}.keep", keep, self.most)
        if decoder is None:
            return Told({**named, KEEP: keep})
        entering, in_tower = self._entering(keep)
        return Told(in_tower, {**named, KEEP: min(keep, entering)})

    def check_raw(self, name: str, values: Mapping[str, Any], entering: int | None = None) -> None:
        """Hold the operator's bounds against our fields in vLLM's own extension points.

        Args:
            name: of the body's field that holds them.
            values: of `mm_processor_kwargs` or `vllm_xargs`.
            entering: visual tokens of the largest image where the values apply; that many are never too few.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        keep, least = values.get(KEEP), self.bounds.min_keep
        if entering is not None:
            least = min(least, entering)
        # What no server allows is refused where the field is read, in the words of processor and decoder.
        if isinstance(keep, int | float) and 1 <= keep < least:
            self.bounds.check_keep(f"{name}.{KEEP}", keep, self.most)
        method = values.get(METHOD)
        config = self.plan.config
        own = (config.method, config.decoder_method.name if config.decoder_method else None)
        if method is not None and method not in own:
            self.bounds.check_method(f"{name}.{METHOD}", method)

    def _entering(self, keep: int) -> tuple[int, dict[str, Any]]:
        """Visual tokens that enter the decoder, and what the tower is told for it."""
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

        least, most = mean(self.bounds.min_keep), mean(self.most)
        if not least <= kv_budget <= most:
            raise ValueError(
                f"{FIELD}.kv_budget = {kv_budget:g} is not allowed; allowed: {least:.2f} to {most:.2f}"
            )
        return bisect_right(range(1, self.most + 1), kv_budget, key=mean)
