"""Filter by two [CLS] attentions: a local scan of a shallow layer, a global one of the last."""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Signals, ranks, require
from ficoco_vllm.reduction.stage import Filter
from ficoco_vllm.reduction.stages.filter import Window


class Scans(Settings):
    """Settings of VScan.

    Attributes:
        scan_window: rows and columns of a window of the local scan; one number means a square.
        local_share: part of the kept tokens that the local scan chooses, as far as the windows divide it.
    """

    scan_window: Window = (6, 6)
    local_share: float = Field(default=0.5, ge=0.0, le=1.0)


def two_scans(signals: Signals, settings: Scans, num_removed: int) -> Tensor:
    """Keep the best tokens of each window by the shallow attention, and the best of the others by the last one.

    Args:
        signals: `shallow_cls_attention` (B, N) and `cls_attention` (B, N).
        settings: see `Scans`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy.

    Source: arXiv:2505.22654, Sec. 3.
    """
    rows, columns = signals.grid
    height, width = settings.scan_window
    num_across = -(-columns // width)
    num_windows = -(-rows // height) * num_across
    position = signals.position.clamp_min(0)
    num_kept = position.shape[1] - num_removed
    from_each = int(num_kept * settings.local_share) // num_windows
    window = position // columns // height * num_across + position % columns // width
    local = _rank_within(window, require(signals, "shallow_cls_attention").float()) < from_each
    return torch.where(local, -1, ranks(require(signals, "cls_attention").float())).float()


def _rank_within(group: Tensor, values: Tensor) -> Tensor:
    """Rank of each value among those of its group, from the highest; of equal values the first ranks higher.

    Args:
        group: (B, N) int64.
        values: (B, N) fp32.

    Returns:
        (B, N) int64, 0 for the highest of a group.
    """
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    grouped, by_group = torch.sort(group.gather(1, order), dim=-1, stable=True)
    place = torch.arange(group.shape[1], device=group.device) - torch.searchsorted(grouped, grouped)
    return torch.empty_like(group).scatter(1, order.gather(1, by_group), place)


STAGES = (Filter(two_scans, frozenset({"shallow_cls_attention", "cls_attention"}), Scans, needs_grid=True),)
