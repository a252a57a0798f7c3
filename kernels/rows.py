"""Rows of each item by index."""

import torch
from torch import Tensor


def take_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each item by index.

    Args:
        values: (B, N, D), any dtype and strides.
        index: (B, K) int64 into N.

    Returns:
        (B, K, D), the dtype of `values`.
    """
    B, _, D = values.shape
    if values.device.type != "cpu":
        return values[torch.arange(B, device=index.device)[:, None], index]
    # A CPU copies whole rows item by item; indexing takes three to five times as long, `gather` twenty.
    taken = values.new_empty((B, index.shape[1], D))
    for item in range(B):
        torch.index_select(values[item], 0, index[item], out=taken[item])
    return taken
