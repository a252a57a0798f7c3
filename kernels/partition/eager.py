"""The partition in torch."""

import torch
from torch import Tensor


def partition(
    redundancy: Tensor, num_removed: int, num_kept: int, length: Tensor | None, removed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    N = redundancy.shape[1]
    if length is not None:
        index = torch.arange(N, device=redundancy.device)
        # Stable sort: what is padding stands behind every protected token, which is -inf too.
        redundancy = redundancy.masked_fill(index >= length[:, None], -torch.inf)
    order = torch.sort(redundancy, dim=-1, descending=True, stable=True).indices
    if length is None and removed is None:
        source = order[:, :num_removed].sort(dim=-1).values
        return source, order[:, num_removed:].sort(dim=-1).values
    rank = torch.arange(N, device=redundancy.device)
    leaves = rank < (num_removed if removed is None else removed[:, None])
    stays = ~leaves & (rank < (N if length is None else length[:, None]))
    return _ascending(order, leaves, num_removed), _ascending(order, stays, num_kept)


def _ascending(order: Tensor, chosen: Tensor, count: int) -> Tensor:
    """The chosen indices of each item in ascending order, -1 behind the last one, (B, count) int64."""
    N = order.shape[1]
    index = torch.where(chosen, order, N).sort(dim=-1).values[:, :count]
    return torch.where(index < N, index, -1)
