"""Dominant tokens stay unchanged; the others are merged into contextual tokens."""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, ranks, require, take
from ficoco_vllm.reduction.stage import Correlation, Filter
from ficoco_vllm.reduction.stages.correlate import NOWHERE, key_cosine


class Contextual(Settings):
    """Settings of VisionZip.

    Attributes:
        contextual_share: part of the kept tokens that are contextual; the authors' is 10 of 64, 20 of 128 and
            30 of 192.
    """

    contextual_share: float = Field(default=0.15625, gt=0.0, le=1.0)

    def num_contextual(self, num_kept: int) -> int:
        """Number of contextual tokens among the kept ones, at least one."""
        return max(1, round(num_kept * self.contextual_share))


def dominant_contextual(signals: Signals, settings: Contextual, num_removed: int) -> Tensor:
    """Keep the tokens that [CLS] attends to most, and evenly spaced ones of the others.

    Args:
        signals: `cls_attention` (B, N).
        settings: see `Contextual`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2412.04467, Sec. 3.
    """
    attention = require(signals, "cls_attention").float()
    N = attention.shape[1]
    num_contextual = settings.num_contextual(N - num_removed)
    num_dominant = N - num_removed - num_contextual
    dominant = ranks(attention) < num_dominant
    step = (N - num_dominant) // num_contextual
    index = (~dominant).cumsum(dim=-1) - 1  # of each other token among the others
    contextual = ~dominant & (index % step == 0) & (index // step < num_contextual)
    return (~(dominant | contextual)).float()


def contextual_cosine(signals: Signals, partition: Partition, settings: Contextual) -> Tensor:
    """C_ij = cosine between the keys of source i and the contextual target j; dominant ones receive nothing.

    Args:
        signals: `keys` (B, N, Dk) and `cls_attention` (B, N).
        partition: R sources and K targets.
        settings: see `Contextual`.

    Returns:
        (B, R, K) fp32, `NOWHERE` for dominant targets.

    Source: arXiv:2412.04467, Sec. 3.
    """
    K = partition.target.shape[1]
    place = take(ranks(require(signals, "cls_attention").float()), partition.target)
    contextual = place >= K - settings.num_contextual(K)
    return torch.where(contextual[:, None], key_cosine(signals, partition, settings), NOWHERE)


STAGES = (
    Filter(dominant_contextual, frozenset({"cls_attention"}), Contextual),
    Correlation(
        contextual_cosine,
        frozenset({"keys", "cls_attention"}),
        Contextual,
        partners=(dominant_contextual,),
        signed=True,
    ),
)
