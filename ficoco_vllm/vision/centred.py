"""Attention on the few cores of a small CPU, where it is a quarter of the vision tower's time."""

from functools import cache

import torch
from torch import Tensor

from ficoco_vllm.compat import multiplies_bfloat16

# With more threads the heads of scaled_dot_product_attention share them better than one product after the other does.
_MOST_THREADS = 4


def is_faster(query: Tensor) -> bool:
    """Whether `centred_attention` takes less time than `scaled_dot_product_attention` does.

    Args:
        query: any shape.
    """
    few = query.device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS
    return few and query.dtype == torch.bfloat16 and _has_products()


# As a function of its own, since the answer never changes and this is asked in every layer.
_has_products = cache(multiplies_bfloat16)


def centred_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention head by head, with the logits of one head at a time in the cache.

    The logits are rounded to bfloat16 between the products, as they are not in a fused kernel. What that costs in
    precision is won back: less the mean of the keys, which no softmax sees, they are smaller and round finer.

    Args:
        query: (B, H, N, d) bfloat16; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        scale: factor of the logits.

    Returns:
        (B, N, H, d) bfloat16.

    Source: arXiv:2411.17686, Eq. 2.
    """
    B, H, N, d = query.shape
    wide = key.float()
    keys = wide.sub_(wide.mean(dim=2, keepdim=True)).mul_(scale).to(key.dtype)
    logits, weights = query.new_empty((N, N)), query.new_empty((N, N))
    mixed = query.new_empty((B, H, N, d))
    for image in range(B):
        for head in range(H):
            torch.mm(query[image, head], keys[image, head].T, out=logits)
            torch.softmax(logits, dim=-1, out=weights)
            torch.mm(weights, value[image, head], out=mixed[image, head])
    return mixed.transpose(1, 2)
