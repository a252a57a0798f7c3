"""Eq. 13 with the quantile threshold, in float64 and plain loops over the sources."""

import math

import torch
from torch import Tensor


def quantile(values: Tensor, epsilon: float) -> Tensor:
    """Linear-interpolation quantile of (K,) values, as `torch.quantile` defines it."""
    ordered = values.sort().values
    rank = epsilon * (len(values) - 1)
    below = math.floor(rank)
    above = min(below + 1, len(values) - 1)
    return torch.lerp(ordered[below], ordered[above], rank - below)


def selected(row: Tensor, epsilon: float, fixed_k: int | None) -> Tensor:
    """Mask of the targets that one source flows into, (K,) bool."""
    if fixed_k is None:
        return row >= quantile(row, epsilon)
    first = row.sort(descending=True, stable=True).indices[:fixed_k]
    return torch.zeros(len(row), dtype=torch.bool).index_fill(0, first, True)


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    epsilon: float,
    fixed_k: int | None,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """X_j = (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij), alpha_ij = C_ij / sum_j C_ij.

    The sums run over the selected pairs. Thresholds are taken in the correlation's own precision.

    Returns:
        Tokens (B, K, D) fp64 and size (B, K) fp64.

    Source: arXiv:2411.17686, Eq. 13; Alg. 1, lines 9-12.
    """
    B, K = target.shape
    merged = torch.zeros((B, K, tokens.shape[2]), dtype=torch.float64)
    new_size = torch.zeros((B, K), dtype=torch.float64)
    for b in range(B):
        total = tokens[b, target[b]].double()
        count = torch.ones(K, dtype=torch.float64)
        new_size[b] = size[b, target[b]].double()
        for row, i in zip(correlation[b], source[b].tolist(), strict=True):
            chosen = selected(row, epsilon, fixed_k) & (row > 0)
            weight = torch.where(chosen, 1.0 if average else row.double(), 0.0)
            if weight.sum() == 0:
                continue
            share = weight / weight.sum()
            alpha = weight if average else share
            total += alpha[:, None] * tokens[b, i].double()
            count += alpha
            new_size[b] += share * size[b, i].double()
        merged[b] = total / count[:, None]
    return merged, new_size
