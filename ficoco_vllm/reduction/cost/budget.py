"""A budget of visual tokens, spread over the layers of one site."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ficoco_vllm.reduction.schedule import KINDS, make_schedule

Pairs = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Budget:
    """How far one site reduces, and where. All layers count from 0.

    Attributes:
        keep: visual tokens of an image after the last reduction.
        kv_budget: instead of `keep`, visual tokens of an image in the KV cache of a decoder layer, on
            average.
        schedule: "even", "one-shot", "geometric", or pairs of a reducing layer and what is left after it;
            None for the method's own.
        start_layer: the first reducing layer, None for the method's own. Pairs name their layers themselves.
    """

    keep: int | None = None
    kv_budget: float | None = None
    schedule: str | Pairs | None = None
    start_layer: int | None = None

    def __post_init__(self) -> None:
        if self.kv_budget is not None and not 1 <= self.kv_budget < math.inf:
            raise ValueError(f"kv_budget: got {self.kv_budget}, allowed: a number of at least 1")

    @property
    def pairs(self) -> Pairs | None:
        """The explicit schedule, if it is one."""
        return None if self.schedule is None or isinstance(self.schedule, str) else self.schedule


@dataclass(frozen=True)
class Traits:
    """What a method brings with it.

    Attributes:
        num_extra: fused tokens that a reducing call appends.
        max_removed: the most tokens that a call may remove out of so many.
        schedule: its own schedule, by name or as what each reducing layer removes.
        start_layer: its own first reducing layer, None for the paper's.
        layers: its own reducing layers, None for all from `start_layer` on.
    """

    num_extra: int = 0
    max_removed: Callable[[int], int] = lambda num_tokens: num_tokens - 1
    schedule: str | tuple[int, ...] = "even"
    start_layer: int | None = None
    layers: tuple[int, ...] | None = None


PLAIN = Traits()


def spread(
    entering: int, num_layers: int, keep: int | None, budget: Budget, default_start: int, traits: Traits
) -> tuple[int, ...]:
    """Tokens that enter each layer, and those that leave the last one, by the schedule of a method.

    Args:
        entering: tokens that enter the first layer.
        num_layers: how many layers there are.
        keep: tokens that leave the last layer.
        budget: with the schedule and the start layer, if they are not the method's own.
        default_start: the first reducing layer if neither budget nor method names one.
        traits: of the method.

    Returns:
        `num_layers + 1` counts.

    Raises:
        ValueError: a setting is missing, out of range, or cannot be met by this method.

    Source: arXiv:2411.17686, Section 10.
    """
    schedule = budget.schedule if isinstance(budget.schedule, str) else traits.schedule
    if isinstance(schedule, str) and schedule not in KINDS:
        allowed = f"{', '.join(KINDS)}, or pairs of a layer and what it keeps"
        raise ValueError(f"schedule: got {schedule!r}, allowed: {allowed}")
    if keep is None or not 1 <= keep <= entering:
        raise ValueError(f"keep: got {keep}, allowed: 1 to {entering}, the visual tokens that enter")
    layers = _reducing_layers(num_layers, budget.start_layer, default_start, traits)
    removed = make_schedule(schedule, entering, keep, layers, traits.num_extra, traits.max_removed)
    counts = [entering]
    for layer in range(num_layers):
        gone = removed.get(layer, 0)
        counts.append(counts[-1] - gone + (traits.num_extra if gone else 0))
    return tuple(counts)


def _reducing_layers(
    num_layers: int, start_layer: int | None, default_start: int, traits: Traits
) -> Sequence[int]:
    if start_layer is None and traits.layers is not None:
        if max(traits.layers) >= num_layers:
            raise ValueError(
                f"layers: the method's are {traits.layers}, allowed: 0 to {num_layers - 1}; name a start_layer"
            )
        return traits.layers
    start = next(start for start in (start_layer, traits.start_layer, default_start) if start is not None)
    if not 0 <= start < num_layers:
        raise ValueError(f"start_layer: got {start}, allowed: 0 to {num_layers - 1}")
    return range(start, num_layers)


def spread_pairs(
    entering: int, num_layers: int, pairs: Pairs, keep: int | None, traits: Traits
) -> tuple[int, ...]:
    """Tokens that enter each layer, and those that leave the last one, by an explicit schedule.

    Args:
        entering: tokens that enter the first layer.
        num_layers: how many layers there are.
        pairs: (layer, tokens left after its reduction), ascending in layers.
        keep: where the schedule ends, or None.
        traits: of the method.

    Returns:
        `num_layers + 1` counts.

    Raises:
        ValueError: a layer or a count is out of range, or cannot be met by this method.

    Source: arXiv:2411.17686, Section 10.
    """
    counts = [entering]
    for layer, left in pairs:
        if not len(counts) - 1 <= layer < num_layers:
            allowed = f"{len(counts) - 1} to {num_layers - 1}, ascending"
            raise ValueError(f"schedule: got layer {layer}, allowed: {allowed}")
        counts += [counts[-1]] * (layer + 1 - len(counts))
        fewest = counts[-1] + traits.num_extra - traits.max_removed(counts[-1])
        if not fewest <= left <= counts[-1]:
            raise ValueError(
                f"schedule: got {left} left after layer {layer}, allowed: {fewest} to {counts[-1]}"
            )
        counts.append(left)
    if keep is not None and keep != counts[-1]:
        raise ValueError(f"keep: got {keep}, allowed: {counts[-1]}, where the schedule ends, or none")
    return (*counts, *[counts[-1]] * (num_layers + 1 - len(counts)))
