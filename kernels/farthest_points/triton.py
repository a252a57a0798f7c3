"""The farthest points in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.tuning import config


@triton.jit
def farthest_points_kernel(distance, first, redundancy, N, K, BLOCK: tl.constexpr):
    """Pick K tokens of one item.

    The distance of each token to the nearest pick stays in registers; a step reads one row. Grid: (B,).
    """
    item = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    seen = i < N
    closest = tl.where(seen, float("inf"), float("-inf"))
    pick = tl.load(first + item).to(tl.int32)
    base = distance + item * N * N
    for _ in range(K):
        row = tl.load(base + pick.to(tl.int64) * N + i, mask=seen, other=0.0)
        # A pick is at -inf from then on, which no minimum lifts.
        closest = tl.where(i == pick, float("-inf"), tl.minimum(closest, row))
        pick = tl.argmax(closest, 0, tie_break_left=True)
    tl.store(redundancy + item * N + i, tl.where(closest > float("-inf"), 1.0, 0.0), mask=seen)


def farthest_points(distance: Tensor, first: Tensor, num_kept: int) -> Tensor:
    """See `ops.farthest_points`."""
    B, N, _ = distance.shape
    redundancy = torch.empty((B, N), dtype=torch.float32, device=distance.device)
    chosen = config("farthest_points", distance.device)
    farthest_points_kernel[(B,)](
        distance.contiguous(),
        first.contiguous(),
        redundancy,
        N,
        num_kept,
        BLOCK=triton.next_power_of_2(N),
        **chosen.arguments,
    )
    return redundancy
