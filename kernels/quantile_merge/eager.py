"""Eq. 13 in torch."""

import math

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import readable
from ficoco_vllm.kernels.gather import take_rows

# From this many multiplications on, it is faster to skip the targets whose weights are all zero.
_MANY_PRODUCTS = 2**22


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
        return take_rows(tokens, target), size.gather(1, target)
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
    received = alpha.sum(dim=1)
    merged, leaving = take_rows(tokens, target), take_rows(tokens, source).float()
    if alpha.numel() * tokens.shape[2] < _MANY_PRODUCTS or not readable(tokens):
        sums = merged.float().baddbmm_(alpha.transpose(1, 2), leaving)
        return sums.div_(1.0 + received[..., None]).to(tokens.dtype)
    # Few targets receive anything; the others stay as they are.
    for item in range(len(tokens)):
        some = received[item].nonzero()[:, 0]
        flow = alpha[item].index_select(1, some).T
        sums = torch.addmm(merged[item].index_select(0, some).float(), flow, leaving[item])
        sums.div_(1.0 + received[item].index_select(0, some)[:, None])
        merged[item].index_copy_(0, some, sums.to(tokens.dtype))
    return merged
