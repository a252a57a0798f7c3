"""Eqs. 11 and 14 with the local penalty, in float64 and plain loops."""

import torch
from torch import Tensor


def filter_scores(
    row_sum: Tensor | None,
    task: Tensor | None,
    weight: float,
    position: Tensor,
    grid: tuple[int, int],
    window: tuple[int, int] | None,
    coefficient: float,
) -> Tensor:
    """See `ops.filter_scores`.

    Returns:
        (B, N) fp64.
    """
    B, N = position.shape
    result = torch.zeros((B, N), dtype=torch.float64)
    for b in range(B):
        if row_sum is not None:
            result[b] += weight / N * row_sum[b].double()
        if task is not None:
            result[b] -= (1.0 - weight) * task[b].double()
        if window is not None:
            result[b] = _penalised(result[b], position[b].tolist(), grid[1], window, coefficient)
    return result


def _penalised(
    scores: Tensor, position: list[int], columns: int, window: tuple[int, int], coefficient: float
) -> Tensor:
    """The first highest score of each window, times the coefficient if positive, else divided by it."""
    highest: dict[tuple[int, int], int] = {}
    for i, place in enumerate(position):
        if place < 0:
            continue
        cell = (place // columns // window[0], place % columns // window[1])
        if cell not in highest or scores[i] > scores[highest[cell]]:
            highest[cell] = i
    result = scores.clone()
    for i in highest.values():
        result[i] = scores[i] * coefficient if scores[i] > 0 else scores[i] / coefficient
    return result
