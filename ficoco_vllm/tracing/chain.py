"""Tokens of a trace, followed from layer to layer.

A patch is named by its index in the grid, or, where an image has tiles, by its index among the patches of all tiles.
Tokens without a patch (fused ones, newlines, a [CLS] that the language model gets) take the numbers after those.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, groupby, pairwise
from typing import Any

import torch

from ficoco_vllm.reduction.method import Site

_ROUNDING = 1e-5  # shares are fp32 and up to a few hundred add up to one

# Puts the tokens of an image's parts into the order in which the decoder gets them: the names of each part's tokens,
# and fresh names for tokens that come in between.
Pack = Callable[[Sequence[Sequence[int]], Iterator[int]], list[int]]


@dataclass(frozen=True)
class Departure:
    """A token that left, and the tokens that took its information.

    Attributes:
        token: its name.
        targets: name and share of each such token, the largest first.
        lost: the share that no token took, 0 to 1.
    """

    token: int
    targets: tuple[tuple[int, float], ...]
    lost: float


@dataclass(frozen=True)
class Step:
    """One reduction.

    Attributes:
        site: "encoder", "features" or "decoder".
        layer: index of the layer.
        kept: names of the tokens after it, in order; fused ones come last.
        num_fused: number of new tokens.
        sizes: patches that each of `kept` represents.
    """

    site: Site
    layer: int
    kept: tuple[int, ...]
    num_fused: int
    left: tuple[Departure, ...]
    sizes: tuple[float, ...]


def joined(parts: Sequence[Sequence[int]], fresh: Iterator[int]) -> list[int]:
    """Order of the tokens of an image without tiles; see `Pack`."""
    return list(chain.from_iterable(parts))


def read_steps(
    trace: Sequence[Mapping[str, Any]], num_patches: Sequence[int], pack: Pack = joined
) -> list[Step]:
    """Name the tokens of a trace.

    Args:
        trace: from `Traces.take`.
        num_patches: patches of each part of the image that the tower sees alone: the image, or each of its tiles.
        pack: order in which the tokens of all parts enter the decoder.

    Returns:
        One step for each reducing layer, in the order in which tokens meet them.

    Raises:
        ValueError: a reduction is missing between two others.
    """
    starts = [0, *accumulate(num_patches)]
    fresh = count(starts[-1])
    parts = [list(range(start, stop)) for start, stop in pairwise(starts)]
    sizes = dict.fromkeys(range(starts[-1]), 1.0)
    steps: list[Step] = []
    for (site, layer), reductions in groupby(sorted(trace, key=_order), key=_layer):
        if site == "decoder" and not (steps and steps[-1].site == "decoder"):
            parts = [pack(parts, fresh)]
        fused: list[int] = []
        left: list[Departure] = []
        for reduction in reductions:
            index = reduction["tile"]
            parts[index], new, gone = _apply(reduction, parts[index], fresh)
            sizes.update(zip(parts[index], reduction["size"], strict=True))
            fused += new
            left += gone
        kept = [name for part in parts for name in part if name not in fused] + fused
        steps.append(
            Step(
                site,
                layer,
                tuple(kept),
                len(fused),
                tuple(left),
                tuple(sizes.get(name, 1.0) for name in kept),
            )
        )
    return steps


def _layer(reduction: Mapping[str, Any]) -> tuple[Site, int]:
    return reduction["site"], reduction["layer"]


def _order(reduction: Mapping[str, Any]) -> tuple[bool, int, int]:
    return reduction["site"] == "decoder", reduction["layer"], reduction["tile"]


def _apply(
    reduction: Mapping[str, Any], names: list[int], fresh: Iterator[int]
) -> tuple[list[int], list[int], list[Departure]]:
    """One reduction of one part of an image.

    Returns:
        Names of its tokens afterwards, those of them that are new, and the tokens that left.
    """
    source, target = reduction["source"], reduction["target"]
    num_tokens = len(source) + len(target)
    if reduction["site"] == "decoder" and num_tokens == len(names) + 1:
        names = [next(fresh), *names]  # [CLS], which select strategy "full" hands to the language model
    if num_tokens != len(names):
        raise ValueError(
            f"the trace is incomplete: {reduction['site']} layer {reduction['layer']} has {num_tokens} tokens, "
            f"and {len(names)} came before"
        )
    new = [next(fresh) for _ in range(len(reduction["size"]) - len(target))]
    kept = [names[index] for index in target] + new
    flows: list[list[tuple[int, float]]] = [[] for _ in source]
    for row, column, value in zip(reduction["rows"], reduction["columns"], reduction["values"], strict=True):
        flows[row].append((kept[column], value))
    return kept, new, [_departure(names[index], flow) for index, flow in zip(source, flows, strict=True)]


def destinations(steps: Sequence[Step]) -> list[Departure]:
    """Final location of the information of every removed token.

    A token that leaves goes into others by its shares; when those leave later, their content moves on with them.

    Args:
        steps: result of `read_steps`.

    Returns:
        One entry for each token that has left, by name; the targets are tokens that stayed.

    Source: arXiv:2411.17686, Alg. 1, lines 9-13, over all layers.
    """
    if not steps:
        return []
    kept = steps[-1].kept
    place = {name: index for index, name in enumerate(kept)}
    held = torch.eye(len(kept), dtype=torch.float64)
    holds = {name: held[index] for name, index in place.items()}
    # From the last step to the first, so that the final content of a target is known when its source is reached.
    for step in reversed(steps):
        for departure in step.left:
            moved = torch.zeros(len(kept), dtype=torch.float64)
            for name, share in departure.targets:
                moved += share * holds[name]
            holds[departure.token] = moved
    gone = sorted(departure.token for step in steps for departure in step.left)
    return [
        _departure(name, [item for item in zip(kept, holds[name].tolist(), strict=True) if item[1]])
        for name in gone
    ]


def _departure(token: int, flow: list[tuple[int, float]]) -> Departure:
    targets = tuple(sorted(flow, key=lambda item: (-item[1], item[0])))
    lost = 1.0 - sum(share for _, share in targets)
    return Departure(token, targets, lost if lost > _ROUNDING else 0.0)
