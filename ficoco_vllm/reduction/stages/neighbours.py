"""Kept tokens as cluster centres that absorb their nearest discarded neighbours."""

from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, ranks, require, take
from ficoco_vllm.reduction.stage import Correlation, Filter
from ficoco_vllm.reduction.stages.correlate import key_cosine


class Neighbours(Settings):
    """Settings of PruMerge.

    Attributes:
        num_neighbours: how many discarded tokens each centre absorbs.
    """

    num_neighbours: int = Field(default=32, ge=1)


def neighbour_attention(signals: Signals, partition: Partition, settings: Neighbours) -> Tensor:
    """C_ij = a_i^CLS where source i is among the nearest neighbours of target j by the cosine of the keys.

    Args:
        signals: `keys` (B, N, Dk) and `cls_attention` (B, N).
        partition: R sources and K targets.
        settings: see `Neighbours`.

    Returns:
        (B, R, K) fp32, 0 for other pairs.

    Source: arXiv:2403.15388, Alg. 1.
    """
    near = _nearest(key_cosine(signals, partition, settings), settings.num_neighbours)
    return _weigh(near, signals, partition)


def _nearest(likeness: Tensor, count: int) -> Tensor:
    """Mark the `count` highest entries of every column, and entries equal to the last of them: (B, R, K) bool."""
    columns = likeness.transpose(1, 2).contiguous()
    lowest = columns.topk(min(count, columns.shape[-1]), dim=-1).values[..., -1]
    return likeness >= lowest[:, None]


def _weigh(near: Tensor, signals: Signals, partition: Partition) -> Tensor:
    """The [CLS] attention of the source where marked: (B, R, K) fp32."""
    attention = take(require(signals, "cls_attention"), partition.source).float()
    return torch.where(near, attention[..., None], 0.0)


class Recovery(Neighbours):
    """Settings of Recoverable Compression, in addition to those of `Neighbours`.

    Attributes:
        visual_share: part of the kept tokens that [CLS] chooses.
        text_share: part that the text recovers; the rest are centres of merged tokens.
        text_weight: weight of the relevance for the text in the choice of neighbours.
    """

    visual_share: float = Field(default=0.5, ge=0.0, le=1.0)
    text_share: float = Field(default=0.3, ge=0.0, le=1.0)
    text_weight: float = Field(default=1.8, ge=0.0)


class Roles(NamedTuple):
    """Disjoint masks, (B, N) bool each, of the reasons why a token stays."""

    attended: Tensor
    relevant: Tensor
    centre: Tensor


def roles(signals: Signals, settings: Recovery, num_kept: int) -> Roles:
    """Choose tokens by [CLS] attention, then others by relevance for the text, then others by [CLS] attention again.

    Args:
        signals: `cls_attention` (B, N) and `text_relevance` (B, N).
        settings: see `Recovery`.
        num_kept: K, tokens with a role.

    Returns:
        Three disjoint masks of K tokens in all.
    """
    num_attended = round(num_kept * settings.visual_share)
    num_relevant = min(round(num_kept * settings.text_share), num_kept - num_attended)
    attention = require(signals, "cls_attention").float()
    relevance = require(signals, "text_relevance").float()
    attended = ranks(attention) < num_attended
    relevant = ranks(relevance.masked_fill(attended, -torch.inf)) < num_relevant
    taken = attended | relevant
    centre = ranks(attention.masked_fill(taken, -torch.inf)) < num_kept - num_attended - num_relevant
    return Roles(attended, relevant, centre)


def text_recovery(signals: Signals, settings: Recovery, num_removed: int) -> Tensor:
    """Keep the tokens that [CLS] attends to, those relevant for the text, and centres for the rest.

    Args:
        signals: `cls_attention` (B, N) and `text_relevance` (B, N).
        settings: see `Recovery`.
        num_removed: R.

    Returns:
        (B, N) fp32 redundancy, 0 for those to keep and 1 for the rest.

    Source: arXiv:2409.01179, Sec. 3.
    """
    role = roles(signals, settings, signals.position.shape[1] - num_removed)
    return (~(role.attended | role.relevant | role.centre)).float()


def recovery_attention(signals: Signals, partition: Partition, settings: Recovery) -> Tensor:
    """C_ij = a_i^CLS where source i is among the nearest neighbours of the centre j.

    Nearness is the cosine of the keys plus the relevance of the source for the text.

    Args:
        signals: `keys` (B, N, Dk), `cls_attention` (B, N) and `text_relevance` (B, N).
        partition: R sources and K targets.
        settings: see `Recovery`.

    Returns:
        (B, R, K) fp32, 0 for other pairs.

    Source: arXiv:2409.01179, Sec. 3.
    """
    role = roles(signals, settings, partition.target.shape[1])
    relevance = take(require(signals, "text_relevance"), partition.source).float()
    likeness = key_cosine(signals, partition, settings) + settings.text_weight * relevance[..., None]
    near = _nearest(likeness, settings.num_neighbours) & take(role.centre, partition.target)[:, None]
    return _weigh(near, signals, partition)


STAGES = (
    Filter(text_recovery, frozenset({"cls_attention", "text_relevance"}), Recovery),
    Correlation(neighbour_attention, frozenset({"keys", "cls_attention"}), Neighbours),
    Correlation(recovery_attention, frozenset({"keys", "cls_attention", "text_relevance"}), Recovery),
)
