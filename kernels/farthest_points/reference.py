"""The farthest points in plain loops."""

import torch
from torch import Tensor


def farthest_points(distance: Tensor, first: Tensor, num_kept: int) -> Tensor:
    """See `ops.farthest_points`."""
    B, N, _ = distance.shape
    redundancy = torch.ones((B, N))
    for b in range(B):
        rows = distance[b].tolist()
        picks = [int(first[b])]
        while len(picks) < num_kept:
            others = [i for i in range(N) if i not in picks]
            picks.append(max(others, key=lambda i: min(rows[pick][i] for pick in picks)))
        redundancy[b, picks] = 0.0
    return redundancy
