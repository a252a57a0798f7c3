"""Bipartite soft matching: even tokens may leave, into odd ones.

Even and odd count the tokens of the call. At most half of them can leave.
"""

import torch
from pydantic import Field
from torch import Tensor

from ficoco_vllm.reduction.settings import Settings
from ficoco_vllm.reduction.signals import Partition, Signals, require
from ficoco_vllm.reduction.stage import Correlation, Filter
from ficoco_vllm.reduction.stages.correlate import NOWHERE, key_cosine


def half(num_tokens: int) -> int:
    """The most tokens that one call can remove: the number of odd ones."""
    return num_tokens // 2


def key_similarity(signals: Signals, settings: Settings) -> Tensor:
    """s_i = the highest cosine between the key of the even token i and that of any odd token j.

    Args:
        signals: `keys` (B, N, Dk), N at least 2.
        settings: none.

    Returns:
        (B, N) fp32 redundancy, -inf for the odd tokens.

    Source: arXiv:2411.17686, Eq. 3; arXiv:2210.09461, Sec. 3.
    """
    keys = torch.nn.functional.normalize(require(signals, "keys").float(), dim=-1)
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores = keys.new_full(keys.shape[:2], -torch.inf)
    scores[:, ::2] = similarity.amax(dim=-1)
    return scores


class Informativity(Settings):
    """Settings of Turbo's information degree.

    Attributes:
        alpha: weight of the semantic value against the mutual redundancy.
    """

    alpha: float = Field(default=10.0, ge=0.0)


def informativity(signals: Signals, settings: Informativity) -> Tensor:
    """s_i = R_i - alpha * a_i^CLS, with R_i the similarity of `key_similarity`.

    Args:
        signals: `keys` (B, N, Dk), N at least 2, and `cls_attention` (B, N).
        settings: see `Informativity`.

    Returns:
        (B, N) fp32 redundancy, -inf for the odd tokens.

    Source: arXiv:2407.11717, Sec. 3.
    """
    return key_similarity(signals, settings) - settings.alpha * require(signals, "cls_attention").float()


def bipartite_cosine(signals: Signals, partition: Partition, settings: Settings) -> Tensor:
    """C_ij = cosine between the keys of source i and the odd target j; even targets receive nothing.

    Args:
        signals: `keys` (B, N, Dk).
        partition: R sources and K targets.
        settings: none.

    Returns:
        (B, R, K) fp32, `NOWHERE` for even targets.

    Source: arXiv:2411.17686, Eq. 6.
    """
    odd = partition.target[:, None] % 2 == 1
    return torch.where(odd, key_cosine(signals, partition, settings), NOWHERE)


STAGES = (
    Filter(key_similarity, frozenset({"keys"}), max_removed=half),
    Filter(informativity, frozenset({"keys", "cls_attention"}), Informativity, max_removed=half),
    Correlation(bipartite_cosine, frozenset({"keys"}), partners=(key_similarity, informativity), signed=True),
)
