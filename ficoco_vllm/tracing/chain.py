"""Tokens of a trace, followed from layer to layer.

A patch is named by its index in the grid. Tokens without a place there, fused ones and a [CLS] that the language model
gets, take the numbers from the number of patches on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch

from ficoco_vllm.reduction.method import Site

_ROUNDING = 1e-5  # shares are fp32 and up to a few hundred add up to one


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


def read_steps(trace: Sequence[Mapping[str, Any]], num_patches: int) -> list[Step]:
    """Name the tokens of a trace.

    Args:
        trace: from `Traces.take`, in the order in which tokens met the reductions.
        num_patches: of the image.

    Returns:
        One step for each reduction.

    Raises:
        ValueError: a reduction is missing between two others.
    """
    names = list(range(num_patches))
    fresh = count(num_patches)
    steps = []
    for layer in trace:
        source, target, size = layer["source"], layer["target"], layer["size"]
        num_tokens = len(source) + len(target)
        if layer["site"] == "decoder" and num_tokens == len(names) + 1:
            names = [next(fresh), *names]  # [CLS], which select strategy "full" hands to the language model
        if num_tokens != len(names):
            raise ValueError(
                f"the trace is incomplete: {layer['site']} layer {layer['layer']} has {num_tokens} tokens, "
                f"and {len(names)} came before"
            )
        num_fused = len(size) - len(target)
        kept = [names[index] for index in target] + [next(fresh) for _ in range(num_fused)]
        flows: list[list[tuple[int, float]]] = [[] for _ in source]
        for row, column, value in zip(layer["rows"], layer["columns"], layer["values"], strict=True):
            flows[row].append((kept[column], value))
        left = tuple(_departure(names[index], flow) for index, flow in zip(source, flows, strict=True))
        steps.append(Step(layer["site"], layer["layer"], tuple(kept), num_fused, left, tuple(size)))
        names = kept
    return steps


def destinations(steps: Sequence[Step]) -> list[Departure]:
    """Final location of the information of every removed token.

    A token that leaves goes into others by its shares; when those leave later, their content moves on with them.

    Args:
        steps: of `read_steps`.

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
