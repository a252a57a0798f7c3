"""Attention on a CPU whose products of bfloat16 are fast, one head after the other."""

from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from ficoco_vllm.compat import multiplies_bfloat16

# Logits that are computed at a time: in bfloat16 they and their weights fit into a processor's cache.
_MAP_SIZE = 2**20
# Logits of all heads of a few queries, in float32.
_ROWS_SIZE = 2**20
# With fewer, the fused kernel is faster: short products cost mostly overhead.
_LEAST_TOKENS = 224
# With more threads, scaled_dot_product_attention, parallel over heads, uses them better than consecutive products.
_MOST_THREADS = 4


def is_faster(query: Tensor) -> bool:
    """Whether `centred_attention` takes less time than `scaled_dot_product_attention` does.

    Args:
        query: (..., N, d), or anything else of N tokens.
    """
    few = query.device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS
    return few and query.dtype == torch.bfloat16 and query.shape[-2] >= _LEAST_TOKENS and _has_products()


# Cached: the answer never changes, and every layer needs it.
_has_products = cache(multiplies_bfloat16)


@dataclass(frozen=True)
class HeadSums:
    """A layer's attention, summed over its heads; each weight is rounded as the layer's own.

    Attributes:
        keys: (B, H, N, d) fp32 as `centred_keys` returns them.
        received: (B, N) fp32 attention that each token receives from all, or None: not measured.
        first: (2, B, N) fp32 attention of each token to the first, and of the first to each, or None.
    """

    keys: Tensor
    received: Tensor | None = None
    first: Tensor | None = None

    def add(self, image: int, start: int, weights: Tensor) -> None:
        """Add the attention of some queries of one head.

        Args:
            image: among the B.
            start: index of the first of these queries.
            weights: (R, N).
        """
        if self.received is not None:
            self.received[image] += weights.sum(dim=0, dtype=torch.float32)
        if self.first is not None:
            self.first[0, image, start : start + len(weights)] += weights[:, 0]
            if start == 0:
                self.first[1, image] += weights[0]


def centred_keys(key: Tensor, scale: float) -> Tensor:
    """Keys without their mean, times the factor of the logits; neither mean nor place in memory changes a softmax.

    Args:
        key: (B, H, N, d), any floating dtype and strides.
        scale: factor of the logits.

    Returns:
        (B, H, N, d) fp32, contiguous: batched products over all heads are then faster.
    """
    keys = key.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return keys.sub_(keys.mean(dim=2, keepdim=True)).mul_(scale)


def centred_attention(query: Tensor, keys: Tensor, value: Tensor, sums: HeadSums | None = None) -> Tensor:
    """Softmax attention head by head.

    Unlike in a fused kernel the logits are rounded to bfloat16 between the products. Centred keys make them smaller and
    thereby their rounding errors.

    Args:
        query: (B, H, N, d) bfloat16; the same for `value`.
        keys: (B, H, N, d) fp32 as `centred_keys` returns them.
        value: see `query`.
        sums: to which this attention is added, or None.

    Returns:
        (B, N, H, d) bfloat16.

    Source: arXiv:2411.17686, Eq. 2.
    """
    B, H, N, d = query.shape
    rounded = keys.to(query.dtype)
    tile = min(N, max(1, _MAP_SIZE // N))
    logits, weights = query.new_empty((tile, N)), query.new_empty((tile, N))
    mixed = query.new_empty((B, H, N, d))
    for image, head, start in product(range(B), range(H), range(0, N, tile)):
        rows = slice(start, start + tile)
        some = query[image, head, rows]
        torch.mm(some, rounded[image, head].T, out=logits[: len(some)])
        torch.softmax(logits[: len(some)], dim=-1, out=weights[: len(some)])
        torch.mm(weights[: len(some)], value[image, head], out=mixed[image, head, rows])
        if sums is not None:
            sums.add(image, start, weights[: len(some)])
    return mixed.transpose(1, 2)


def attention_rows(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax attention of a few queries, summed over the heads; for them no normalisers are known.

    Args:
        query: (B, H, R, d), any floating dtype.
        keys: (B, H, N, d) fp32 as `centred_keys` returns them.

    Returns:
        (B, R, N) fp32.

    Source: arXiv:2411.17686, Eq. 12.
    """
    B, H, R, _ = query.shape
    N = keys.shape[2]
    queries = query.float()
    total = keys.new_zeros((B, R, N))
    step = max(1, _ROWS_SIZE // (R * N))
    for image, start in product(range(B), range(0, H, step)):
        heads = slice(start, start + step)
        logits = torch.bmm(queries[image, heads], keys[image, heads].transpose(1, 2))
        total[image] += logits.softmax(dim=-1).sum(dim=0)
    return total
