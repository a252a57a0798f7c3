"""Public entry point of the filter scores: validates arguments and dispatches to torch or Triton."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.filter_scores import eager


def filter_scores(
    row_sum: Tensor | None,
    task: Tensor | None,
    weight: float,
    *,
    position: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None = (2, 2),
    coefficient: float = 2.0,
    backend: Backend = "auto",
) -> Tensor:
    """s_i = weight / N * row_sum_i - (1 - weight) * task_i, then the local penalty.

    Eq. 11: `task` is the [CLS] row, `weight` lambda. Eq. 14: `task` is the attention of the text, `weight` beta,
    `window` None.

    Args:
        row_sum: (B, N) sums of the attention rows over the visual tokens, any floating dtype, or None. Sums close
            to 1 need fp64: fp32 rounds away the differences between tokens.
        task: (B, N) attention of [CLS] or of the text to each token, any floating dtype, or None.
        weight: weight of the first term against the second, 0 to 1.
        position: (B, N) int64 index in the original grid, -1 for a token that has no place in it.
        grid: rows and columns of the original grid.
        window: rows and columns of a window of the local penalty; None leaves the penalty out.
        coefficient: the first highest score of each window is multiplied by it if positive and divided by it if
            negative; at least 1.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, N) fp64 redundancy. Scores of hundreds of tokens may differ by less than fp32 resolves.

    Raises:
        ValueError: `coefficient` is below 1.

    Source: arXiv:2411.17686, Eqs. 11 and 14; Sec. 3.1, "local penalty"; Alg. 1, line 3.
    """
    if coefficient < 1.0:
        raise ValueError(f"coefficient = {coefficient} is not allowed; allowed: at least 1")
    if not uses_triton(backend, position):
        return eager.filter_scores(row_sum, task, weight, position, grid, window, coefficient)
    sides = None if window is None else list(window)
    scores: Tensor = _filter_scores(row_sum, task, weight, position, list(grid), sides, coefficient)
    return scores


@torch.library.custom_op("ficoco::filter_scores", mutates_args=())
def _filter_scores(
    row_sum: Tensor | None,
    task: Tensor | None,
    weight: float,
    position: Tensor,
    grid: list[int],
    window: list[int] | None,
    coefficient: float,
) -> Tensor:
    from ficoco_vllm.kernels.filter_scores import triton

    sides = None if window is None else (window[0], window[1])
    return triton.filter_scores(row_sum, task, weight, position, (grid[0], grid[1]), sides, coefficient)


@_filter_scores.register_fake
def _(row_sum, task, weight, position, *_rest):  # type: ignore[no-untyped-def]
    return position.new_empty(position.shape, dtype=torch.float64)
