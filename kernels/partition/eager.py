"""The partition in torch."""

import torch
from torch import Tensor


def partition(redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    order = torch.sort(redundancy, dim=-1, descending=True, stable=True).indices
    return order[:, :num_removed].sort(dim=-1).values, order[:, num_removed:].sort(dim=-1).values
