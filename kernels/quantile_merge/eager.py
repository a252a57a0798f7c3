"""Eq. 13 in torch."""

import math

import torch
from torch import Tensor


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
    """See `ops.quantile_merge`."""
    if fixed_k == 0:
        return _rows(tokens, target), size.gather(1, target)
    share = _weights(correlation.float(), epsilon, fixed_k)
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
    return weighted_mean(tokens, alpha, source, target), moved.add_(size.gather(1, target))


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """Rows (B, K, D) of the tokens (B, N, D)."""
    return tokens[torch.arange(tokens.shape[0], device=tokens.device)[:, None], index]


def _weights(correlation: Tensor, epsilon: float, fixed_k: int | None) -> Tensor:
    """Selected correlations, zero elsewhere and where negative, (B, R, K) fp32."""
    if fixed_k is None:
        chosen = correlation >= row_quantile(correlation, epsilon)
    else:
        K = correlation.shape[-1]
        order = correlation.sort(dim=-1, descending=True, stable=True).indices[..., : min(fixed_k, K)]
        chosen = torch.zeros_like(correlation, dtype=torch.bool).scatter_(-1, order, True)
    return correlation.clamp_min(0.0).masked_fill_(chosen.logical_not_(), 0.0)


def row_quantile(values: Tensor, epsilon: float) -> Tensor:
    """Exact quantile of each row by linear interpolation, computed from its few largest entries.

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


def weighted_mean(tokens: Tensor, alpha: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Weighted mean of every target (weight 1) and the sources that flow into it.

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
    sums = _rows(tokens, target).float().baddbmm_(flow, _rows(tokens, source).float())
    return sums.div_(1.0 + flow.sum(dim=-1, keepdim=True)).to(tokens.dtype)
