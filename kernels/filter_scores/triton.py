"""Eqs. 11 and 14 with the local penalty, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import bits_of, rows_contiguous
from ficoco_vllm.kernels.tuning import config


@triton.jit
def _scores(row_sum, task, i, seen, share, task_weight):
    """The scores share * row_sum_i - task_weight * task_i in fp64."""
    scores = tl.zeros(i.shape, tl.float64)
    if row_sum is not None:
        scores += share * tl.load(row_sum + i, mask=seen, other=0.0).to(tl.float64)
    if task is not None:
        scores -= task_weight * tl.load(task + i, mask=seen, other=0.0).to(tl.float64)
    return scores


@triton.jit
def _cells(position, i, seen, columns, window_rows, window_columns, across):
    """Number of the window of each token, -1 where it is in none."""
    place = tl.load(position + i, mask=seen, other=-1).to(tl.int32)
    row, column = place // columns, place % columns
    return tl.where(place >= 0, row // window_rows * across + column // window_columns, -1)


@triton.jit(do_not_specialize=["weight_bits", "coefficient_bits"])
def filter_scores_kernel(
    row_sum,
    task,
    position,
    out,
    row_sum_stride,
    task_stride,
    position_stride,
    N,
    weight_bits,
    columns,
    window_rows,
    window_columns,
    across,
    coefficient_bits,
    PENALTY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """s_i = weight / N * row_sum_i - (1 - weight) * task_i, then the local penalty.

    A token is the peak of its window if no other token of the window is higher, or equal and before it. Each tile of
    tokens is compared with all tokens of its image, so nothing is scattered and the result does not depend on the
    order of execution. Grid: (tiles of the tokens, B).
    """
    item = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    share = weight / (tl.zeros((), tl.int32) + N).to(tl.float64)
    task_weight = 1.0 - weight
    seen = i < N
    if row_sum is not None:
        row_sum += item * row_sum_stride
    if task is not None:
        task += item * task_stride
    position += item * position_stride
    scores = _scores(row_sum, task, i, seen, share, task_weight)
    if PENALTY:
        coefficient = coefficient_bits.to(tl.int64).to(tl.float64, bitcast=True)
        cells = _cells(position, i, seen, columns, window_rows, window_columns, across)
        beaten = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, N, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            others_seen = j < N
            others = _scores(row_sum, task, j, others_seen, share, task_weight)
            theirs = _cells(position, j, others_seen, columns, window_rows, window_columns, across)
            same = (cells[:, None] == theirs[None, :]) & (cells >= 0)[:, None]
            before = (others[None, :] == scores[:, None]) & (j[None, :] < i[:, None])
            above = same & ((others[None, :] > scores[:, None]) | before)
            beaten = tl.maximum(beaten, tl.max(above.to(tl.int32), 1))
        peak = (cells >= 0) & (beaten == 0)
        lifted = tl.where(scores > 0, scores * coefficient, scores / coefficient)
        scores = tl.where(peak, lifted, scores)
    tl.store(out + item * N + i, scores, mask=seen)


def filter_scores(
    row_sum: Tensor | None,
    task: Tensor | None,
    weight: float,
    position: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None,
    coefficient: float,
) -> Tensor:
    """See `ops.filter_scores`."""
    B, N = position.shape
    out = torch.empty((B, N), dtype=torch.float64, device=position.device)
    if not out.numel():
        return out
    row_sum, task = (None if given is None else rows_contiguous(given) for given in (row_sum, task))
    position = rows_contiguous(position)
    sides = window or (1, 1)
    chosen = config("filter_scores", position.device)
    filter_scores_kernel[(triton.cdiv(N, chosen.tiles["BLOCK_N"]), B)](
        row_sum,
        task,
        position,
        out,
        0 if row_sum is None else row_sum.stride(0),
        0 if task is None else task.stride(0),
        position.stride(0),
        N,
        bits_of(weight),
        grid[1],
        sides[0],
        sides[1],
        triton.cdiv(grid[1], sides[1]),
        bits_of(coefficient),
        PENALTY=window is not None,
        **chosen.tiles,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
        enable_fp_fusion=False,  # round as torch does, so that equal scores stay equal
    )
    return out
