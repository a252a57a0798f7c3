"""Compressions into one target, into a sum, or into an extra token. Shapes as in `compress.py`."""

import torch
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, take
from ficoco_vllm.reduction.stage import Compression
from ficoco_vllm.reduction.stages.compress import merge
from ficoco_vllm.reduction.stages.correlate import NOWHERE


class NearestMerge(Settings):
    """Settings of Eq. 9.

    Attributes:
        size_weighted: weigh tokens by the number of patches that they represent, so that a merged token is the mean of
            its patches; False weighs all tokens equally, as Eq. 9 is printed.
    """

    size_weighted: bool = True


def nearest_merge(
    tokens: Tensor, size: Tensor, partition: Partition, correlation: Tensor, settings: NearestMerge
) -> tuple[Tensor, Tensor]:
    """Merge each source into the target that it correlates with most (the first of equals), by the mean.

    A source whose best correlation is `NOWHERE` is dropped, its size too.

    Args:
        tokens: (B, N, D), any floating dtype.
        size: (B, N) fp32.
        partition: R sources and K targets.
        correlation: (B, R, K) fp32.
        settings: see `NearestMerge`.

    Returns:
        Tokens (B, K, D) and size (B, K).

    Source: arXiv:2411.17686, Eq. 9; arXiv:2210.09461, Sec. 3 (weighted by size).
    """
    best = correlation.argmax(dim=-1, keepdim=True)
    has_target = (correlation.gather(-1, best) > NOWHERE).float()
    share = torch.zeros_like(correlation).scatter(-1, best, has_target)
    if not settings.size_weighted:
        return merge(tokens, size, partition, share, share)
    ratio = take(size, partition.source)[..., None] / take(size, partition.target)[:, None]
    return merge(tokens, size, partition, share * ratio, share)


def add(
    tokens: Tensor, size: Tensor, partition: Partition, correlation: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """X_j = X_j + sum_i C_ij X_i, without a denominator.

    The size of a source is shared evenly among the targets that it is added to; if there are none, it is
    lost.

    Args:
        tokens: (B, N, D), any floating dtype; the sum is taken in fp32.
        size: (B, N) fp32.
        partition: R sources and K targets.
        correlation: (B, R, K) fp32.
        settings: none.

    Returns:
        Tokens (B, K, D) and size (B, K).

    Source: arXiv:2411.17686, Eq. 10; arXiv:2403.15388, Alg. 1.
    """
    taken = (correlation != 0).float()
    share = taken / taken.sum(dim=-1, keepdim=True).clamp_min(1.0)
    source, target = take(tokens, partition.source).float(), take(tokens, partition.target).float()
    added = target.baddbmm_(correlation.transpose(1, 2), source)  # in place: `take` has made a copy
    moved = torch.bmm(take(size, partition.source)[:, None], share)[:, 0]
    return added.to(tokens.dtype), take(size, partition.target) + moved


def fuse(
    tokens: Tensor, size: Tensor, partition: Partition, correlation: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Append one token: 0 + sum_i C_i X_i over all sources, with C_i the mean of row i.

    Args:
        tokens: (B, N, D), any floating dtype; the sum is taken in fp32.
        size: (B, N) fp32.
        partition: R sources and K targets, K at least 1.
        correlation: (B, R, K) fp32.
        settings: none.

    Returns:
        Tokens (B, K + 1, D) and size (B, K + 1); the new token has the size of all sources.

    Source: arXiv:2411.17686, Eq. 10, with the zero vector as the only target.
    """
    return _append(tokens, size, partition, correlation.mean(dim=-1))


def fuse_mean(
    tokens: Tensor, size: Tensor, partition: Partition, correlation: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Append one token: the mean of all sources.

    Args:
        tokens: (B, N, D), any floating dtype; the sum is taken in fp32.
        size: (B, N) fp32.
        partition: R sources, R at least 1, and K targets.
        correlation: not read.
        settings: none.

    Returns:
        Tokens (B, K + 1, D) and size (B, K + 1); the new token has the size of all sources.

    Source: arXiv:2409.10994, Sec. 3.
    """
    B, R = partition.source.shape
    return _append(tokens, size, partition, size.new_full((B, R), 1.0 / R))


def _append(tokens: Tensor, size: Tensor, partition: Partition, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The targets, followed by the weighted sum of the sources."""
    extra = torch.bmm(weight[:, None], take(tokens, partition.source).float())
    total = take(size, partition.source).sum(dim=-1, keepdim=True)
    kept = torch.cat([take(tokens, partition.target), extra.to(tokens.dtype)], dim=1)
    return kept, torch.cat([take(size, partition.target), total], dim=1)


STAGES = (
    Compression(nearest_merge, settings=NearestMerge, merges=True),
    Compression(add),
    Compression(fuse, num_extra=1, merges=True),
    Compression(fuse_mean, num_extra=1, merges=True, correlated=False),
)
