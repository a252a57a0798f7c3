"""The farthest points in torch: a loop over the picks, each step batched over the items."""

import torch
from torch import Tensor


def farthest_points(distance: Tensor, first: Tensor, num_kept: int) -> Tensor:
    """See `ops.farthest_points`."""
    item = torch.arange(distance.shape[0], device=distance.device)
    closest = torch.full_like(distance[:, 0], torch.inf)
    pick = first
    for _ in range(num_kept):
        # A pick is at -inf from then on, which no minimum lifts.
        closest = torch.minimum(closest, distance[item, pick]).scatter_(1, pick[:, None], -torch.inf)
        pick = closest.argmax(dim=-1)
    return (closest > -torch.inf).to(distance.dtype)
