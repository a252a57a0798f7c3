"""The partition in one launch: an exact order statistic instead of sorts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.ordering import kth_largest, least_bits, ordered_bits
from ficoco_vllm.kernels.tuning import config


@triton.jit
def partition_kernel(
    redundancy,
    length,
    removed,
    source,
    target,
    N,
    R,
    K,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Split the tokens of one image, both parts in ascending order.

    What leaves is above the R-th largest score, or equal to it and among the first of its equals. Its place
    is a running count, so the order is kept. Grid: (B,).
    """
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    num_tokens, num_leaving = N, R
    if length is not None:
        num_tokens = tl.load(length + item).to(tl.int32)
    if removed is not None:
        num_leaving = tl.load(removed + item).to(tl.int32)
    there = i < num_tokens
    bits = ordered_bits(tl.load(redundancy + item * N + i, mask=there, other=0.0))
    bits = tl.where(there, bits, least_bits(WIDE))
    count = tl.zeros((1,), tl.int32) + num_leaving
    border = tl.sum(kth_largest(tl.expand_dims(bits, 0), count, WIDE), 0)
    above = bits > border
    tie = there & (bits == border)
    open_places = num_leaving - tl.sum(above.to(tl.int32), 0)
    leaves = there & (above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= open_places)))
    stays = there & ~leaves
    leaving_place = tl.cumsum(leaves.to(tl.int32), 0) - 1
    staying_place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(source + item * R + leaving_place, i.to(tl.int64), mask=leaves & (leaving_place < R))
    tl.store(target + item * K + staying_place, i.to(tl.int64), mask=stays & (staying_place < K))
    # Behind the last one of an item; these places are none of the above.
    nothing = tl.full((BLOCK,), -1, tl.int64)
    tl.store(source + item * R + i, nothing, mask=(i >= tl.sum(leaves.to(tl.int32), 0)) & (i < R))
    tl.store(target + item * K + i, nothing, mask=(i >= tl.sum(stays.to(tl.int32), 0)) & (i < K))


def partition(
    redundancy: Tensor, num_removed: int, num_kept: int, length: Tensor | None, removed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    B, N = redundancy.shape
    source = torch.empty((B, num_removed), dtype=torch.int64, device=redundancy.device)
    target = torch.empty((B, num_kept), dtype=torch.int64, device=redundancy.device)
    if not redundancy.numel():
        return source, target
    wide = redundancy.dtype == torch.float64
    redundancy = redundancy if wide else redundancy.float()
    chosen = config("partition", redundancy.device)
    partition_kernel[(B,)](
        redundancy.contiguous(),
        length,
        removed,
        source,
        target,
        N,
        num_removed,
        num_kept,
        WIDE=wide,
        BLOCK=triton.next_power_of_2(N),
        **chosen.arguments,
    )
    return source, target
