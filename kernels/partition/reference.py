"""The partition in plain Python."""

import torch
from torch import Tensor


def partition(
    redundancy: Tensor, num_removed: int, num_kept: int, length: Tensor | None, removed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    B, N = redundancy.shape
    source = torch.full((B, num_removed), -1)
    target = torch.full((B, num_kept), -1)
    for b in range(B):
        num_tokens = N if length is None else int(length[b])
        num_leaving = num_removed if removed is None else int(removed[b])
        scores = redundancy[b, :num_tokens].tolist()
        # Python's sort leaves equals in their order, also in reverse.
        leaving = sorted(sorted(range(num_tokens), key=scores.__getitem__, reverse=True)[:num_leaving])
        staying = sorted(set(range(num_tokens)) - set(leaving))
        source[b, : len(leaving)] = torch.tensor(leaving, dtype=torch.int64)
        target[b, : len(staying)] = torch.tensor(staying, dtype=torch.int64)
    return source, target
