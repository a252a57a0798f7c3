"""Rows of each item by index, alone or of every head."""

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


def take_head_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each item's heads by index.

    Args:
        values: (B, H, N, d), any dtype and strides.
        index: (B, R) int64 into N, the same for all heads.

    Returns:
        (B, H, R, d), the dtype of `values`.
    """
    B, H, _, d = values.shape
    rows = take_rows(values.transpose(1, 2).flatten(2), index)
    return rows.view(B, index.shape[1], H, d).transpose(1, 2)
