"""The local penalty: spread what leaves evenly over the image."""

import torch
from torch import Tensor

from ficoco_vllm.reduction.signals import Signals


def local_penalty(scores: Tensor, signals: Signals, window: tuple[int, int], coefficient: float) -> Tensor:
    """Let the most redundant token of each window leave sooner, and so its neighbours later.

    Windows lie on the original grid; tokens that left earlier are blanks, fused tokens (position -1) are in
    no window. The maximum of a window (the first one, if several are equal) is multiplied by `coefficient`
    where positive and divided by it where negative.

    Args:
        scores: (B, N) fp32 redundancy.
        signals: for `position` and `grid`.
        window: rows and columns of a window.
        coefficient: at least 1; 1 changes nothing.

    Returns:
        (B, N) fp32.

    Source: arXiv:2411.17686, Sec. 3.1, "local penalty"; Alg. 1, line 3.
    """
    B, N = scores.shape
    rows, columns = signals.grid
    windows_across = -(-columns // window[1])
    num_windows = -(-rows // window[0]) * windows_across
    placed = signals.position >= 0
    row, column = signals.position // columns, signals.position % columns
    cell = row // window[0] * windows_across + column // window[1]
    cell = torch.where(placed, cell, num_windows)  # one bucket behind the last window for what has no place

    highest = scores.new_full((B, num_windows + 1), -torch.inf).scatter_reduce(1, cell, scores, "amax")
    index = torch.arange(N, device=scores.device).expand(B, N)
    candidate = torch.where(scores == highest.gather(1, cell), index, N)
    first = index.new_full((B, num_windows + 1), N).scatter_reduce(1, cell, candidate, "amin")
    peak = placed & (index == first.gather(1, cell))
    return torch.where(peak, torch.where(scores > 0, scores * coefficient, scores / coefficient), scores)
