"""Filters by position, and the correlation of tokens in the same cell of the grid."""

import math

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.kernels.quantile_merge import row_quantile
from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, ranks, require, take
from ficoco_vllm.reduction.stage import Correlation, Filter
from ficoco_vllm.reduction.stages.correlate import NOWHERE

_MASK = 0xFFFFFFFF  # 32 bits
_MIX = 0x045D9F3B  # an odd 27-bit multiplier: products of 32-bit numbers with it stay below 2^63


class Seed(Settings):
    """Settings of the random order.

    Attributes:
        seed: seed of the hash.
    """

    seed: int = Field(default=0, ge=0)


def random_order(signals: Signals, settings: Seed) -> Tensor:
    """s_i = a hash of the seed and of the original position of token i.

    The order is the same on every machine, independent of the batch and of random generators.

    Args:
        signals: only `position`.
        settings: see `Seed`.

    Returns:
        (B, N) fp32 redundancy, integers below 2^24.

    Source: arXiv:2411.17686, Table 3, "Random Sampling".
    """
    mixed = (signals.position + settings.seed * 0x9E3779B1) & _MASK
    for _ in range(2):
        mixed = ((mixed ^ (mixed >> 16)) * _MIX) & _MASK
    return ((mixed ^ (mixed >> 16)) >> 8).float()


def outlier_then_even(signals: Signals, settings: Settings, num_removed: int) -> Tensor:
    """Keep the outliers of the [CLS] attention, then fill up with evenly spaced tokens.

    An outlier lies more than 1.5 interquartile ranges above the third quartile. If there are more of them
    than tokens to keep, the most attended ones stay; the spaces are even along the raster order of the
    others.

    Args:
        signals: `cls_attention` (B, N).
        settings: none.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2403.15388, Sec. 3.
    """
    attention = require(signals, "cls_attention").float()
    N = attention.shape[1]
    first, third = row_quantile(attention, 0.25), row_quantile(attention, 0.75)
    outlier = attention > third + 1.5 * (third - first)
    num_outliers = outlier.sum(dim=-1, keepdim=True)
    num_others = (N - num_outliers).clamp_min(1)
    num_even = (N - num_removed - num_outliers).clamp_min(0)
    index = (~outlier).cumsum(dim=-1)  # of each other token among the others, from 1
    middle = num_others // 2
    steps = (index * num_even + middle) // num_others - ((index - 1) * num_even + middle) // num_others
    even = ~outlier & (steps > 0)
    tier = torch.where(outlier, 0, torch.where(even, 1, 2))
    return (tier * N + ranks(attention)).float()


def cells(position: Tensor, grid: tuple[int, int], num_cells: int) -> Tensor:
    """Cut the grid into cells of nearly equal size and shape: bands of rows, each cut along its columns.

    Args:
        position: (B, N) int64, original positions.
        grid: rows and columns.
        num_cells: how many, at most rows times columns.

    Returns:
        (B, N) int64 cell of each token; a token without a place goes with the first cell.
    """
    rows, columns = grid
    wanted = min(rows, num_cells, round(math.sqrt(num_cells * rows / columns)))
    num_bands = max(1, wanted, -(-num_cells // columns))
    each, rest = divmod(num_cells, num_bands)
    position = position.clamp_min(0)
    band = position // columns * num_bands // rows
    first = band * each + band.clamp_max(rest)
    return first + position % columns * (each + (band < rest)) // columns


def one_per_cell(signals: Signals, settings: Settings, num_removed: int) -> Tensor:
    """Keep the first token of each cell; there are as many cells as kept tokens.

    Args:
        signals: only `position` and `grid`.
        settings: none.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2411.17686, Table 3, "Spatial Pooling".
    """
    B, N = signals.position.shape
    num_cells = N - num_removed
    cell = cells(signals.position, signals.grid, num_cells)
    index = torch.arange(N, device=cell.device).expand(B, N)
    first = index.new_full((B, num_cells), N).scatter_reduce(1, cell, index, "amin")
    return (index != first.gather(1, cell)).float()


def same_cell(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = 1 where source i and target j lie in one cell.

    Args:
        signals: only `position` and `grid`.
        partition: R sources and K targets; there are K cells.
        settings: none.

    Returns:
        (B, R, K) fp32, `NOWHERE` for other pairs.

    Source: arXiv:2411.17686, Table 3, "Spatial Pooling".
    """
    cell = cells(signals.position, signals.grid, partition.target.shape[1])
    source, target = take(cell, partition.source), take(cell, partition.target)
    return torch.where(source[..., None] == target[:, None], 1.0, NOWHERE)


STAGES = (
    Filter(random_order, settings=Seed, needs_grid=True),
    Filter(outlier_then_even, frozenset({"cls_attention"})),
    Filter(one_per_cell, needs_grid=True),
    Correlation(same_cell, partners=(one_per_cell,), needs_grid=True),
)
