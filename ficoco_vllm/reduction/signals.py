"""Signals that a reduction method may read, and the partition of tokens into those that leave and those that stay."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.gather import take_rows

# Axis of the visual tokens of a signal, if not the second one; 0 for signals without such an axis.
TOKEN_AXIS = {"text_attention": 2, "text_features": 0}

# Error texts for signals that a site cannot provide.
WHY_ABSENT = {
    "text_relevance": "the question is compared with the output of the vision encoder",
    "text_attention": "the text is seen in the decoder only",
    "text_features": "the text is seen in the decoder only",
    "cls_attention": "only the vision encoder has a [CLS] token",
    "shallow_cls_attention": "it is measured for methods that reduce once, after the vision encoder",
}


class AttentionMap(Protocol):
    """An attention map of which only parts are computed, so that no (B, N, N) tensor is written.

    It replaces the tensor `Signals.visual_attention`; see there for the entries.
    """

    @property
    def shape(self) -> torch.Size:
        """(B, N, N)."""

    def row_sum(self) -> Tensor:
        """Sum over the keys, (B, N) fp64."""

    def column_sum(self) -> Tensor:
        """Sum over the queries, (B, N) fp32."""

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """Chosen rows and columns, (B, R, K) fp32, and Eq. 15 where `text` (B, M, N) is given; see `via_text`."""

    def dense(self) -> Tensor:
        """All of it, (B, N, N) fp32."""


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Measurements of one reducing layer, recomputed after every reduction.

    B images, N visual tokens still alive, M text tokens. Any floating dtype; decisions are taken in float32.
    A signal that a method does not name as required may be None (or hold anything).

    Attributes:
        visual_attention: (B, N, N) head-mean attention, query i to key j. The softmax runs over all keys ([CLS]
            included), of which only the visual tokens are returned, so that a row sums to less than one.
        cls_attention: (B, N) head-mean attention of [CLS] to each visual token.
        shallow_cls_attention: (B, N) the same of a shallow layer, the 6th of 24.
        text_attention: (B, M, N) head-mean attention, text query k to visual key j. The last row is the last
            token of the prompt.
        keys: (B, N, Dk) head-mean keys.
        features: (B, N, Df) vectors whose similarity is measured; `reduce` takes the tokens themselves if None.
        text_features: (B, M, Df) hidden states of the text tokens, in the space of `features`.
        text_relevance: (B, N) how well each visual token fits the question: the mean cosine between its embedding and
            those of the question in the language model, or the cosine between CLIP's projected patch and its projected
            text.
        position: (B, N) int64 index in the original raster grid, -1 for a token that has no place in it.
        grid: rows and columns of the original grid.

    Source: arXiv:2411.17686, Sec. 2.3.
    """

    visual_attention: Tensor | AttentionMap | None = None
    cls_attention: Tensor | None = None
    shallow_cls_attention: Tensor | None = None
    text_attention: Tensor | None = None
    keys: Tensor | None = None
    features: Tensor | None = None
    text_features: Tensor | None = None
    text_relevance: Tensor | None = None
    position: Tensor
    grid: tuple[int, int]


class Partition(NamedTuple):
    """Partition of the N tokens, as indices.

    Attributes:
        source: (B, R) int64, ascending: the tokens that leave.
        target: (B, K) int64, ascending: the tokens that stay.
    """

    source: Tensor
    target: Tensor


@dataclass(frozen=True)
class WrittenMap:
    """A tensor as an `AttentionMap`.

    Attributes:
        values: (B, N, N), any floating dtype.
    """

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(B, N, N)."""
        return self.values.shape

    def row_sum(self) -> Tensor:
        """See `AttentionMap`."""
        return self.values.sum(dim=-1, dtype=torch.float64)

    def column_sum(self) -> Tensor:
        """See `AttentionMap`."""
        return self.values.sum(dim=1, dtype=torch.float32)

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """See `AttentionMap`."""
        rows = take(self.values, source)
        direct = rows.gather(2, target[:, None].expand(-1, source.shape[1], -1)).float()
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """See `AttentionMap`."""
        return self.values


def partition(redundancy: Tensor, num_removed: int, backend: Backend = "torch") -> Partition:
    """Split off the `num_removed` most redundant tokens.

    Args:
        redundancy: (B, N) fp32 or fp64, higher leaves first, -inf protects; equal scores leave in index order.
        num_removed: R, 0 <= R <= N.
        backend: implementation of the fused op.

    Returns:
        Source and target indices, both ascending, so that the order of the tokens is kept.

    Source: arXiv:2411.17686, Alg. 1, lines 4-5.
    """
    return Partition(*kernels.partition(redundancy, num_removed, backend=backend))


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows of each image by index.

    Args:
        values: (B, N) or (B, N, D), any dtype.
        index: (B, K) int64 into N.

    Returns:
        (B, K) or (B, K, D), the dtype of `values`.
    """
    return values.gather(1, index) if values.dim() == 2 else take_rows(values, index)


def ranks(values: Tensor) -> Tensor:
    """Rank of each value in its row, from the highest; of equal values the first ranks higher.

    Args:
        values: (B, N) fp32.

    Returns:
        (B, N) int64, 0 for the highest.
    """
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place)


def require(signals: Signals, name: str) -> Tensor:
    """A required signal, as a tensor.

    Raises:
        ValueError: the signal is None.
    """
    value: Tensor | AttentionMap | None = getattr(signals, name)
    if value is None:
        raise ValueError(f"the signal `{name}` is needed here and was not given")
    return value if isinstance(value, Tensor) else value.dense()


def attention_map(signals: Signals) -> AttentionMap:
    """`visual_attention` as an `AttentionMap`; a lazy map stays unwritten.

    Raises:
        ValueError: the signal is None.
    """
    attention = signals.visual_attention
    if attention is None or isinstance(attention, Tensor):
        return WrittenMap(require(signals, "visual_attention"))
    return attention


def via_text(direct: Tensor, text: Tensor, source: Tensor, target: Tensor, gamma: float) -> Tensor:
    """C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ki * A_kj, with k over the text tokens.

    Args:
        direct: (B, R, K) fp32, A_ij; overwritten.
        text: (B, M, N) attention of the text tokens, any floating dtype.
        source: (B, R) int64.
        target: (B, K) int64.
        gamma: weight of the direct term.

    Returns:
        (B, R, K) fp32.

    Source: arXiv:2411.17686, Eq. 15.
    """
    received = text.transpose(1, 2)
    to_source, to_target = take(received, source).float(), take(received, target).float()
    return direct.baddbmm_(to_source, to_target.transpose(1, 2), beta=gamma, alpha=1.0 - gamma)
