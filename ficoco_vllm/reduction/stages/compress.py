"""Compressions: fusing discarded tokens into kept ones.

Each takes tokens (B, N, D), size (B, N) fp32, the partition and the correlation (B, R, K) fp32, and returns
tokens (B, K + E, D) in the dtype that came in and size (B, K + E) fp32.
"""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.quantile_merge import weighted_mean
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, take
from ficoco_vllm.reduction.stage import Compression


class QuantileMerge(Settings):
    """Settings of Eq. 13.

    Attributes:
        epsilon: quantile of a source's correlations that is its threshold.
        fixed_k: merge each source into exactly this many targets instead (0 prunes); None is token-adaptive.
        average: give every selected pair the weight 1 instead of its share (the paper's "average
            compression").
    """

    epsilon: float = Field(default=0.998, ge=0.0, le=1.0)
    fixed_k: int | None = Field(default=None, ge=0)
    average: bool = False


def spreads(settings: QuantileMerge) -> bool:
    """Whether sources flow into targets at all under these settings."""
    return settings.fixed_k != 0


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    partition: Partition,
    correlation: Tensor,
    settings: QuantileMerge,
    backend: Backend = "torch",
) -> tuple[Tensor, Tensor]:
    """X_j = (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij), alpha_ij = C_ij / sum_j C_ij.

    The sums run over the selected pairs. The size of source i moves to target j by the share alpha_ij
    (evenly under `average`), so its sum is kept. Where the selected correlations of a source sum to zero,
    its information and its size are dropped.

    Args:
        tokens: (B, N, D), any floating dtype.
        size: (B, N) fp32, number of original patches that each token represents. It does not weigh the merge.
        partition: R sources and K targets.
        correlation: (B, R, K) fp32.
        settings: see `QuantileMerge`.
        backend: implementation of the fused op.

    Returns:
        Tokens (B, K, D) and size (B, K).

    Deviation: negative correlations (cosines, logits) weigh nothing. Eq. 13 is written for attention, which
    has none; with mixed signs its denominator could vanish.

    Source: arXiv:2411.17686, Eq. 13.
    """
    source, target = partition
    return kernels.quantile_merge(
        tokens,
        size,
        correlation,
        source,
        target,
        epsilon=settings.epsilon,
        fixed_k=settings.fixed_k,
        average=settings.average,
        backend=backend,
    )


def merge(
    tokens: Tensor, size: Tensor, partition: Partition, alpha: Tensor, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean of every target (weight 1) with the sources that flow into it (weight alpha).

    Args:
        tokens: (B, N, D), any floating dtype; sums are taken in fp32.
        size: (B, N) fp32.
        partition: R sources and K targets.
        alpha: (B, R, K) fp32 weight of source i in target j.
        share: (B, R, K) fp32 part of the size of source i that goes to target j.

    Returns:
        Tokens (B, K, D) and size (B, K).

    Source: arXiv:2411.17686, Eq. 13, first line.
    """
    moved = torch.bmm(take(size, partition.source)[:, None], share)[:, 0]
    merged = weighted_mean(tokens, alpha, partition.source, partition.target)
    return merged, take(size, partition.target) + moved


def prune(
    tokens: Tensor, size: Tensor, partition: Partition, correlation: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """X_j = X_j: tokens that leave are lost, their size too.

    Args:
        tokens: (B, N, D), any floating dtype.
        size: (B, N) fp32.
        partition: K targets.
        correlation: not read.
        settings: none.

    Returns:
        Tokens (B, K, D) and size (B, K).

    Source: arXiv:2411.17686, Sec. 2.3.3, FastV.
    """
    return take(tokens, partition.target), take(size, partition.target)


STAGES = (
    Compression(quantile_merge, settings=QuantileMerge, merges=spreads, positive=True, correlated=spreads),
    Compression(prune, correlated=False),
)
