"""Eqs. 11 and 14 with the local penalty, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import bits_of
from ficoco_vllm.kernels.tuning import config


@triton.jit
def _scores(drawn, task, protect, item, i, seen, N, share, task_weight):
    """The scores share * drawn_i - task_weight * task_i in fp64; -inf where protected."""
    scores = tl.zeros(i.shape, tl.float64)
    if drawn is not None:
        scores += share * tl.load(drawn + item * N + i, mask=seen, other=0.0).to(tl.float64)
    if task is not None:
        scores -= task_weight * tl.load(task + item * N + i, mask=seen, other=0.0).to(tl.float64)
    if protect is not None:
        scores = tl.where(tl.load(protect + item * N + i, mask=seen, other=0) != 0, float("-inf"), scores)
    return scores


@triton.jit
def _cells(position, item, i, seen, N, columns, window_rows, window_columns, across):
    """Number of the window of each token, -1 where it is in none."""
    place = tl.load(position + item * N + i, mask=seen, other=-1).to(tl.int32)
    row, column = place // columns, place % columns
    return tl.where(place >= 0, row // window_rows * across + column // window_columns, -1)


@triton.jit(do_not_specialize=["weight_bits", "coefficient_bits"])
def filter_scores_kernel(
    drawn,
    task,
    protect,
    position,
    length,
    out,
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
    """s_i = weight / N * drawn_i - (1 - weight) * task_i, then the local penalty.

    A token is the peak of its window if no other token of the window is higher, nor equal and before it: each
    tile of tokens is compared with all of its image, so nothing is scattered and nothing depends on an order
    of execution. Grid: (tiles of the tokens, B).
    """
    item = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    num_tokens = N
    if length is not None:
        num_tokens = tl.load(length + item).to(tl.int32)
    weight = weight_bits.to(tl.int64).to(tl.float64, bitcast=True)
    share = weight / tl.maximum(num_tokens, 1).to(tl.float64)
    task_weight = 1.0 - weight
    seen = i < num_tokens
    scores = _scores(drawn, task, protect, item, i, seen, N, share, task_weight)
    if PENALTY:
        coefficient = coefficient_bits.to(tl.int64).to(tl.float64, bitcast=True)
        cells = _cells(position, item, i, seen, N, columns, window_rows, window_columns, across)
        beaten = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, num_tokens, BLOCK_J):
            j = start + tl.arange(0, BLOCK_J)
            others_seen = j < num_tokens
            others = _scores(drawn, task, protect, item, j, others_seen, N, share, task_weight)
            theirs = _cells(position, item, j, others_seen, N, columns, window_rows, window_columns, across)
            same = (cells[:, None] == theirs[None, :]) & (cells >= 0)[:, None]
            before = (others[None, :] == scores[:, None]) & (j[None, :] < i[:, None])
            above = same & ((others[None, :] > scores[:, None]) | before)
            beaten = tl.maximum(beaten, tl.max(above.to(tl.int32), 1))
        peak = (cells >= 0) & (beaten == 0)
        lifted = tl.where(scores > 0, scores * coefficient, scores / coefficient)
        scores = tl.where(peak, lifted, scores)
    tl.store(out + item * N + i, tl.where(seen, scores, float("-inf")), mask=i < N)


def filter_scores(
    drawn: Tensor | None,
    task: Tensor | None,
    weight: float,
    position: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None,
    coefficient: float,
    protect: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    """See `ops.filter_scores`."""
    B, N = position.shape
    out = torch.empty((B, N), dtype=torch.float64, device=position.device)
    if not out.numel():
        return out
    sides = window or (1, 1)
    chosen = config("filter_scores", position.device)
    filter_scores_kernel[(triton.cdiv(N, chosen.tiles["BLOCK_N"]), B)](
        None if drawn is None else drawn.contiguous(),
        None if task is None else task.contiguous(),
        None if protect is None else protect.contiguous().view(torch.int8),
        position.contiguous(),
        length,
        out,
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
        enable_fp_fusion=False,  # scores round as torch's do, so that what is equal there is equal here
    )
    return out
