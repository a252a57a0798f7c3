"""Eq. 13 in torch."""

import math

import torch
from torch import Tensor

from ficoco_vllm.kernels.quantile_merge.layout import Layout


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    layout: Layout,
    epsilon: float,
    fixed_k: int | None,
    average: bool,
    ragged: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.quantile_merge`."""
    absent_source = source < 0 if ragged else None
    absent_target = target < 0 if ragged else None
    if ragged:
        source, target = source.clamp_min(0), target.clamp_min(0)
    if fixed_k == 0:
        merged, new_size = _kept(tokens, target), size.gather(1, target)
        return _without(merged, new_size, absent_target)
    share = _weights(
        _cut(correlation, source, target, layout), absent_source, absent_target, epsilon, fixed_k
    )
    if average:
        share = (share > 0).float()
        alpha = share
        total = share.sum(dim=-1, keepdim=True)
        share = share / torch.where(total > 0, total, 1.0)
    else:
        total = share.sum(dim=-1, keepdim=True)
        share = share.div_(torch.where(total > 0, total, 1.0))
        alpha = share
    moved = torch.bmm(size.gather(1, source).float()[:, None], share)[:, 0]
    new_size = moved.add_(size.gather(1, target))
    merged = weighted_mean(tokens, alpha, source, target)
    return _without(merged, new_size, absent_target)


def _without(merged: Tensor, new_size: Tensor, absent: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros where a target is none."""
    if absent is not None:
        merged.masked_fill_(absent[..., None], 0.0)
        new_size.masked_fill_(absent, 0.0)
    return merged, new_size


def _kept(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, D) of the tokens (B, N, D)."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]


def _cut(correlation: Tensor, source: Tensor, target: Tensor, layout: Layout) -> Tensor:
    """The correlation of the sources with the targets, (B, R, K) fp32."""
    if layout == "map":
        correlation = correlation.gather(1, source[..., None].expand(-1, -1, correlation.shape[2]))
    if layout != "cut":
        correlation = correlation.gather(2, target[:, None].expand(-1, correlation.shape[1], -1))
    return correlation.float()


def _weights(
    correlation: Tensor,
    absent_source: Tensor | None,
    absent_target: Tensor | None,
    epsilon: float,
    fixed_k: int | None,
) -> Tensor:
    """Selected correlations, zero elsewhere and where negative, (B, R, K) fp32."""
    if absent_target is not None:
        # Behind every finite value, and of equals in the last place, as padding is.
        correlation = correlation.masked_fill(absent_target[:, None], -torch.inf)
    K = correlation.shape[-1]
    if fixed_k is None:
        if absent_target is None:
            threshold = row_quantile(correlation, epsilon)
        else:
            threshold = _ragged_quantile(correlation, epsilon, (~absent_target).sum(dim=1))
        chosen = correlation >= threshold
    else:
        order = correlation.sort(dim=-1, descending=True, stable=True).indices[..., : min(fixed_k, K)]
        chosen = torch.zeros_like(correlation, dtype=torch.bool).scatter_(-1, order, True)
    weight = correlation.clamp_min(0.0).masked_fill_(chosen.logical_not_(), 0.0)
    return weight if absent_source is None else weight.masked_fill_(absent_source[..., None], 0.0)


def row_quantile(values: Tensor, epsilon: float) -> Tensor:
    """Quantile of each row by linear interpolation, exact, from the few largest entries alone.

    Args:
        values: (..., K) fp32.
        epsilon: 0 to 1.

    Returns:
        (..., 1) fp32.

    Source: arXiv:2411.17686, Alg. 1, line 9.
    """
    K = values.shape[-1]
    rank = epsilon * (K - 1)
    below = math.floor(rank)
    largest = values.topk(K - below, dim=-1).values
    low = largest[..., -1:]
    high = largest[..., -2:-1] if below < K - 1 else low
    return torch.lerp(low, high, rank - below)


def _ragged_quantile(values: Tensor, epsilon: float, count: Tensor) -> Tensor:
    """The same with `count` (B,) entries of each row, (B, R, 1) fp32."""
    rank = epsilon * (count - 1).clamp_min(0).double()
    below = rank.floor()
    place = (count - 1 - below.long()).clamp_min(0)[:, None, None].expand(-1, values.shape[1], 1)
    ordered = values.sort(dim=-1, descending=True).values
    low, high = ordered.gather(2, place), ordered.gather(2, (place - 1).clamp_min(0))
    return torch.lerp(low, high, (rank - below).float()[:, None, None].expand_as(low))


def weighted_mean(tokens: Tensor, alpha: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Weighted mean of every target (weight 1) with what flows in.

    Args:
        tokens: (B, N, D), any floating dtype; sums are taken in fp32.
        alpha: (B, R, K) fp32 weight of source i in target j.
        source: (B, R) int64 into N.
        target: (B, K) int64 into N.

    Returns:
        (B, K, D) in the dtype of `tokens`.

    Source: arXiv:2411.17686, Eq. 13, first line.
    """
    flow = alpha.transpose(1, 2)
    # In place: indexing has made a copy, and a second one costs a third of the time.
    sums = _kept(tokens, target).float().baddbmm_(flow, _kept(tokens, source).float())
    return sums.div_(1.0 + flow.sum(dim=-1, keepdim=True)).to(tokens.dtype)
