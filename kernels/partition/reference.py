"""The partition in plain Python."""

import torch
from torch import Tensor


def partition(redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    """See `ops.partition`."""
    sources, targets = [], []
    for scores in redundancy.tolist():
        # Python's sort keeps equal entries in their order, also in reverse.
        leaving = sorted(sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:num_removed])
        sources.append(leaving)
        targets.append(sorted(set(range(len(scores))) - set(leaving)))
    return torch.tensor(sources, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
