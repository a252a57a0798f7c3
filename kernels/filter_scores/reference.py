"""Eqs. 11 and 14 with the local penalty, in float64 and plain loops."""

import torch
from torch import Tensor


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
    """See `ops.filter_scores`.

    Returns:
        (B, N) fp64.
    """
    B, N = position.shape
    result = torch.full((B, N), -torch.inf, dtype=torch.float64)
    for b in range(B):
        num_tokens = N if length is None else int(length[b])
        scores = torch.zeros(num_tokens, dtype=torch.float64)
        if drawn is not None:
            scores += weight / max(num_tokens, 1) * drawn[b, :num_tokens].double()
        if task is not None:
            scores -= (1.0 - weight) * task[b, :num_tokens].double()
        if protect is not None:
            scores[protect[b, :num_tokens]] = -torch.inf
        if window is not None:
            scores = _penalised(scores, position[b, :num_tokens].tolist(), grid[1], window, coefficient)
        result[b, :num_tokens] = scores
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
