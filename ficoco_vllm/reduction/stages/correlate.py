"""Correlations: where should the information of a discarded token be preserved?"""

import torch
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, attention_rows, require, take


def columns(rows: Tensor, partition: Partition) -> Tensor:
    """Cut the columns of the targets out of the rows (B, R, N) of the sources.

    Returns:
        (B, R, K) fp32.
    """
    B, R = partition.source.shape
    K = partition.target.shape[1]
    return rows.gather(2, partition.target[:, None].expand(B, R, K)).float()


def none(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = 0: nothing is preserved.

    Args:
        signals: none.
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32 zeros, without memory of their own.

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
    return columns(attention_rows(signals, partition.source), partition)


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
    keys = torch.nn.functional.normalize(require(signals, "keys").float(), dim=-1)
    return take(keys, partition.source) @ take(keys, partition.target).transpose(1, 2)
