"""The door to the filter scores."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.filter_scores import eager


def filter_scores(
    drawn: Tensor | None,
    task: Tensor | None,
    weight: float,
    *,
    position: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None = (2, 2),
    coefficient: float = 2.0,
    protect: Tensor | None = None,
    length: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """s_i = weight / N * drawn_i - (1 - weight) * task_i, then the local penalty.

    Eq. 11: `drawn` are the row sums, `task` the [CLS] row, `weight` lambda. Eq. 14: `task` is what the text
    gives, `weight` beta, `window` None.

    Args:
        drawn: (B, N) sums of the attention rows over the visual tokens, any floating dtype, or None. Where they
            are next to 1, fp32 would round away what tells the tokens apart: give fp64.
        task: (B, N) attention of [CLS] or of the text to each token, any floating dtype, or None.
        weight: of the first term against the second, 0 to 1.
        position: (B, N) int64 index in the original grid, -1 for a token that has no place in it.
        grid: rows and columns of the original grid.
        window: rows and columns of a window of the local penalty; None leaves the penalty out.
        coefficient: what the peak of a window is multiplied (divided, if negative) by; at least 1.
        protect: (B, N) bool, tokens that must stay: -inf. They are no peaks, so another token of the window
            is.
        length: (B,) int32 or int64, how many tokens each item has, the N of the equation; None means all.
            What lies behind is -inf.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, N) fp64 redundancy: scores of hundreds of tokens may differ behind what fp32 holds.

    Raises:
        ValueError: `coefficient` is below 1.

    Source: arXiv:2411.17686, Eqs. 11 and 14; Sec. 3.1, "local penalty"; Alg. 1, line 3.
    """
    if coefficient < 1.0:
        raise ValueError(f"coefficient = {coefficient} is not allowed; allowed: at least 1")
    if not uses_triton(backend, position):
        return eager.filter_scores(drawn, task, weight, position, grid, window, coefficient, protect, length)
    found: Tensor = _filter_scores(
        drawn,
        task,
        weight,
        position,
        list(grid),
        None if window is None else list(window),
        coefficient,
        protect,
        length,
    )
    return found


@torch.library.custom_op("ficoco::filter_scores", mutates_args=())
def _filter_scores(
    drawn: Tensor | None,
    task: Tensor | None,
    weight: float,
    position: Tensor,
    grid: list[int],
    window: list[int] | None,
    coefficient: float,
    protect: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    from ficoco_vllm.kernels.filter_scores import triton

    sides = None if window is None else (window[0], window[1])
    return triton.filter_scores(
        drawn, task, weight, position, (grid[0], grid[1]), sides, coefficient, protect, length
    )


@_filter_scores.register_fake
def _(drawn, task, weight, position, *_rest):  # type: ignore[no-untyped-def]
    return position.new_empty(position.shape, dtype=torch.float64)
