"""The partition in one launch: an exact order statistic instead of sorts."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.ordering import kth_largest, least_bits, ordered_bits
from ficoco_vllm.kernels.tuning import config


@triton.jit
def partition_kernel(redundancy, source, target, N, R, K, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Split the tokens of one image, both parts in ascending order.

    A token leaves if its score is above the R-th largest, or equal to it and among the first of its equals. Its place
    is a running count, so the order is kept. Grid: (B,).
    """
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    valid = i < N
    bits = ordered_bits(tl.load(redundancy + item * N + i, mask=valid, other=0.0))
    bits = tl.where(valid, bits, least_bits(WIDE))
    count = tl.zeros((1,), tl.int32) + R
    border = tl.sum(kth_largest(tl.expand_dims(bits, 0), count, WIDE), 0)
    above = bits > border
    tie = valid & (bits == border)
    open_places = R - tl.sum(above.to(tl.int32), 0)
    leaves = valid & (above | (tie & (tl.cumsum(tie.to(tl.int32), 0) <= open_places)))
    stays = valid & ~leaves
    leaving_place = tl.cumsum(leaves.to(tl.int32), 0) - 1
    staying_place = tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(source + item * R + leaving_place, i.to(tl.int64), mask=leaves & (leaving_place < R))
    tl.store(target + item * K + staying_place, i.to(tl.int64), mask=stays & (staying_place < K))


def partition(redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    B, N = redundancy.shape
    source = torch.empty((B, num_removed), dtype=torch.int64, device=redundancy.device)
    target = torch.empty((B, N - num_removed), dtype=torch.int64, device=redundancy.device)
    if not redundancy.numel():
        return source, target
    wide = redundancy.dtype == torch.float64
    redundancy = redundancy if wide else redundancy.float()
    chosen = config("partition", redundancy.device)
    partition_kernel[(B,)](
        redundancy.contiguous(),
        source,
        target,
        N,
        num_removed,
        N - num_removed,
        WIDE=wide,
        BLOCK=triton.next_power_of_2(N),
        **chosen.arguments,
    )
    return source, target
