"""Correlations: targets for the information of each discarded token."""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, attention_map, require, take
from ficoco_vllm.reduction.stage import Correlation

# Marks a pair that must not merge: below every cosine, yet finite, so that quantiles stay numbers.
NOWHERE = -2.0


def none(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = 0: nothing is preserved.

    Args:
        signals: none.
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32 zeros, expanded from one element.

    Source: arXiv:2411.17686, Sec. 2.3.2, FastV.
    """
    B, R = partition.source.shape
    zero = torch.zeros((), dtype=torch.float32, device=partition.source.device)
    return zero.expand(B, R, partition.target.shape[1])


def attention(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = A_ij for source i and target j.

    Args:
        signals: `visual_attention` (B, N, N).
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32.

    Source: arXiv:2411.17686, Eq. 12.
    """
    return attention_map(signals).block(partition.source, partition.target)


def cls_weight(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = a_i^CLS, the same for every target.

    Args:
        signals: `cls_attention` (B, N).
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32, expanded along K.

    Source: arXiv:2411.17686, Eq. 7.
    """
    B, R = partition.source.shape
    weight = take(require(signals, "cls_attention"), partition.source).float()
    return weight[..., None].expand(B, R, partition.target.shape[1])


class ViaText(Settings):
    """Settings of Eq. 15.

    Attributes:
        gamma: weight of the direct against the indirect correlation.
        direct_correlation: count the attention of a source to a target.
        indirect_correlation: count the attention of the text to both of them.
    """

    gamma: float = Field(default=0.6, ge=0.0, le=1.0)
    direct_correlation: bool = True
    indirect_correlation: bool = True


def via_text_signals(settings: ViaText) -> frozenset[str]:
    """Signals that Eq. 15 reads under these settings."""
    used = {"visual_attention": settings.direct_correlation, "text_attention": settings.indirect_correlation}
    return frozenset(name for name, on in used.items() if on)


def attention_via_text(signals: Signals, partition: Partition, settings: ViaText) -> Tensor:
    """C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ki * A_kj, with k over the text tokens.

    The direct term is the causal A_ij: zero where target j comes after source i. Both factors of the indirect
    term are attention of the text tokens, for the reason given at `local_text`.

    Args:
        signals: `visual_attention` (B, N, N) and `text_attention` (B, M, N).
        partition: R sources and K targets.
        settings: see `ViaText`.

    Returns:
        (B, R, K) fp32.

    Source: arXiv:2411.17686, Eq. 15.
    """
    if not settings.indirect_correlation:
        if not settings.direct_correlation:
            return none(signals, partition, settings)
        return attention(signals, partition, settings) * settings.gamma
    text = require(signals, "text_attention")
    if settings.direct_correlation:
        return attention_map(signals).block(partition.source, partition.target, text, settings.gamma)
    received = text.transpose(1, 2)
    source = take(received, partition.source).float()
    target = take(received, partition.target).float()
    return torch.bmm(source, target.transpose(1, 2)).mul_(1.0 - settings.gamma)


def key_cosine(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = cosine between the keys of source i and target j.

    Args:
        signals: `keys` (B, N, Dk).
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32.

    Source: arXiv:2411.17686, Eq. 6.
    """
    return _cosine(require(signals, "keys"), partition)


def feature_cosine(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = cosine between the features of source i and target j.

    Args:
        signals: `features` (B, N, Df).
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32.

    Source: arXiv:2505.22654, Sec. 3.
    """
    return _cosine(require(signals, "features"), partition)


def _cosine(vectors: Tensor, partition: Partition) -> Tensor:
    unit = torch.nn.functional.normalize(vectors.float(), dim=-1)
    return take(unit, partition.source) @ take(unit, partition.target).transpose(1, 2)


STAGES = (
    Correlation(none, partners=()),
    Correlation(attention, frozenset({"visual_attention"})),
    Correlation(attention_via_text, via_text_signals, ViaText),
    Correlation(cls_weight, frozenset({"cls_attention"})),
    Correlation(key_cosine, frozenset({"keys"}), signed=True),
    Correlation(feature_cosine, frozenset({"features"}), signed=True),
)
