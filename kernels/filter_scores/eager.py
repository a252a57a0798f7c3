"""Eqs. 11 and 14 with the local penalty, in torch."""

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
    """See `ops.filter_scores`."""
    B, N = position.shape
    scores = position.new_zeros((B, N), dtype=torch.float64)
    if row_sum is not None:
        scores = scores + weight / N * row_sum.double()
    if task is not None:
        scores = scores - (1.0 - weight) * task.double()
    return scores if window is None else _penalised(scores, position, grid, window, coefficient)


def _penalised(
    scores: Tensor, position: Tensor, grid: tuple[int, int], window: tuple[int, int], coefficient: float
) -> Tensor:
    """The first highest score of each window, times the coefficient if positive, else divided by it."""
    B, N = scores.shape
    index = torch.arange(N, device=position.device).expand(B, N)
    placed = position >= 0
    across = -(-grid[1] // window[1])
    num_windows = -(-grid[0] // window[0]) * across
    cell = position // grid[1] // window[0] * across + position % grid[1] // window[1]
    cell = torch.where(placed, cell, num_windows)  # one extra bucket for tokens without a place
    highest = scores.new_full((B, num_windows + 1), -torch.inf).scatter_reduce(1, cell, scores, "amax")
    candidate = torch.where(scores == highest.gather(1, cell), index, N)
    first = index.new_full((B, num_windows + 1), N).scatter_reduce(1, cell, candidate, "amin")
    peak = placed & (index == first.gather(1, cell))
    return torch.where(peak, torch.where(scores > 0, scores * coefficient, scores / coefficient), scores)
