"""Translation of the field `ficoco` into arguments for the image processor and the decoder: integers and names."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil
from statistics import fmean
from typing import Any, Literal

from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import VISION_SITES, Budget
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.registry import names
from ficoco_vllm.request_fields import FIELD, KEEP, KEEP_RATIO, METHOD
from ficoco_vllm.server.request_field.schema import OFF, FicocoRequest


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

    def allowed_keep(self, max_keep: int) -> str:
        """Range of a budget, for error texts."""
        return f"an integer from {self.min_keep} to {max_keep}"

    def check_keep(self, name: str, keep: float, max_keep: int) -> None:
        """Refuse a budget outside of the bounds."""
        if not self.min_keep <= keep <= max_keep:
            raise ValueError(f"{name} = {keep} is not allowed; allowed: {self.allowed_keep(max_keep)}")
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

    def allowed(self, name: str) -> str:
        """Allowed values of one part of the field on this server, for error texts."""
        if name == "method":
            return ", ".join((*self.methods, OFF) if self.bounds.allows_off else self.methods)
        if name == "keep":
            return self.bounds.allowed_keep(self.max_keep)
        if name == "keep_ratio":
            return "a number above 0, at most 1"
        return "{:.2f} to {:.2f}".format(*self._kv_budgets(None))

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
            why = self._why_not(requested.method)
            raise ValueError(
                f"{FIELD}.method = {requested.method!r} is not allowed{why}; allowed: {self.allowed('method')}"
            )
        # A pipeline has its own methods; its name selects nothing in a request.
        method = None if self.plan.config.method in PIPELINES else requested.method
        named = {} if method is None else {METHOD: method}
        keep = requested.keep
        if requested.keep_ratio is not None:
            name = f"{FIELD}.keep_ratio"
            if decoder is not None:
                raise ValueError(
                    f"{name} = {requested.keep_ratio} is not allowed, since this server reduces in the decoder; "
                    f"allowed: {FIELD}.keep"
                )
            self._check_ratio(name, requested.keep_ratio)
            return Resolved({**named, KEEP_RATIO: requested.keep_ratio})
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
        ratio = values.get(KEEP_RATIO)
        if isinstance(ratio, int | float) and 0 < ratio <= 1:
            self._check_ratio(f"{name}.{KEEP_RATIO}", ratio)
        method = values.get(METHOD)
        config = self.plan.config
        own = (config.method, config.decoder_method.name if config.decoder_method else None)
        if method is not None and method not in own:
            self.bounds.check_method(f"{name}.{METHOD}", method)

    def _check_ratio(self, name: str, ratio: float) -> None:
        """Refuse a share of the tokens of each image that is outside of the bounds for the largest image."""
        self.bounds.check_reduces(name, ratio, 1)
        if max(1, round(ratio * self.max_keep)) < self.bounds.min_keep:
            least = self.bounds.min_keep / self.max_keep
            raise ValueError(f"{name} = {ratio} is not allowed; allowed: a number from {least:.4f} to 1")

    def check_images(self, name: str, budget: Budget, sizes: Sequence[tuple[int, int]]) -> None:
        """Refuse a share that keeps fewer tokens of an image than the operator's bound, where their number differs.

        An image that has fewer tokens than the bound keeps all of them.

        Args:
            name: name of the field that holds the share.
            budget: budget of the request.
            sizes: height and width in pixels of each image.

        Raises:
            ValueError: starting with the field, then its value and what is allowed.
        """
        tower = self.plan.tower
        tiling = tower.shape.tiling
        if budget.ratio is None or tiling is None or not tiling.dynamic:
            return
        for height, width in sizes:
            most = tower.num_before(height=height, width=width)
            least = min(self.bounds.min_keep, most)
            keep = budget.of(most)
            if keep < least:
                share = ceil(1e4 * least / most) / 1e4
                raise ValueError(
                    f"{name} = {budget.ratio} is not allowed: of the {most} visual tokens of an image of {width} x "
                    f"{height} pixels it keeps {keep}, fewer than {least}; allowed: a number from {share:.4f} to 1"
                )

    def _entering(self, keep: int) -> tuple[int, dict[str, Any]]:
        """Visual tokens that enter the decoder for a budget, and the arguments of the tower that lead there."""
        plan = self.plan
        if not plan.tower_follows:
            return plan.tower.num_output_tokens(plan.tower.default), {}
        tower_keep = plan.tower_keep(keep)
        return plan.tower.num_output_tokens(plan.tower.budget(None, tower_keep)), {KEEP: tower_keep}

    def _why_not(self, name: str) -> str:
        """Reason, for error texts, why an existing method is not served here; empty if the method does not exist."""
        config = self.plan.config
        if config.method in PIPELINES:
            return f", since this server reduces twice, by {config.method}" if name in names() else ""
        if name in PIPELINES:
            return ", since it reduces twice, for which a server is started with it (--ficoco-method)"
        if name not in names():
            return ""
        if self.bounds.methods is not None and name not in self.bounds.methods:
            return ", since the operator has chosen others (--ficoco-allow-methods)"
        if name in CONTROLS:
            tiling = self.plan.tower.shape.tiling
            if tiling is None or not tiling.dynamic:
                return f", since it needs {CONTROLS[name].needs}"
            return ", since it works before the vision tower, and this server reduces in the decoder"
        method = get(name)
        where = dict.fromkeys(VISION_SITES, "in the vision tower") | {"decoder": "in the decoder"}
        here = "decoder" if self.plan.decoder is not None else VISION_SITES[0]
        if where[method.site] != where[here]:
            return f", since it reduces {where[method.site]}, and this server {where[here]}"
        try:
            method.configure().check_signals(SITES[method.site])
        except ValueError as error:
            return f", since {error}".partition("; given are")[0]
        return ""

    def _kv_budgets(self, method: str | None) -> tuple[float, float]:
        """The smallest and the largest average over the layers that a method can reach."""
        return self._mean(method, self.bounds.min_keep), self._mean(method, self.max_keep)

    def _mean(self, method: str | None, keep: int) -> float:
        """Visual tokens of an image in the KV cache, averaged over the layers."""
        decoder = self.plan.decoder
        if decoder is None:
            return keep
        entering, _ = self._entering(keep)
        return fmean(decoder.counts(method or decoder.method, entering, min(keep, entering)))

    def _keep_of(self, method: str | None, kv_budget: float) -> int:
        """The largest `keep` whose KV cache, averaged over the layers, is no larger than the budget."""
        smallest, largest = self._kv_budgets(method)
        if not smallest <= kv_budget <= largest:
            varies = self.plan.decoder is not None and self.plan.tower.shape.tiling is not None
            of_largest = f", for the largest image; for smaller ones use {FIELD}.keep" if varies else ""
            raise ValueError(
                f"{FIELD}.kv_budget = {kv_budget:g} is not allowed; "
                f"allowed: {smallest:.2f} to {largest:.2f}{of_largest}"
            )
        return bisect_right(range(1, self.max_keep + 1), kv_budget, key=partial(self._mean, method))
