"""Keys of earlier steps, read from vLLM's paged KV cache."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

# Exact in every format of a KV cache.
_BASE = 64


def cached_keys(attention: Any, slots: Tensor) -> Tensor:
    """Keys that a layer's cache holds.

    Args:
        attention: vLLM's attention layer.
        slots: (tokens,) int64.

    Returns:
        (tokens, H', d) in the format of the cache.
    """
    kv_cache: Tensor = attention.kv_cache  # (blocks, H', slots of a block, 2 * d) for every backend
    _, num_heads, block_size, _ = kv_cache.shape
    block, place = slots // block_size, slots % block_size
    head = torch.arange(num_heads, device=slots.device)
    if kv_cache.device.type != "cpu":
        return kv_cache[block[:, None], head, place[:, None], : attention.head_size]
    row, column = _cpu_order(attention.impl, attention, kv_cache.dtype, block_size)
    return kv_cache[block[:, None, None], head[:, None], row[place][:, None], column[place][:, None]]


@cache
def _cpu_order(impl: Any, attention: Any, dtype: torch.dtype, block_size: int) -> tuple[Tensor, Tensor]:
    """Places in which vLLM's CPU kernel stores the numbers of a key within its block and head.

    The kernels of several instruction sets pack keys in orders of their own. Each number of a block of keys is written
    as digits, one cache for each digit, and located in the result.

    Returns:
        Row and column in the (block_size, 2 * d) numbers of a block and head, each (block_size, d) int64.
    """
    num_heads, head_size = attention.num_kv_heads, attention.head_size
    size = block_size * head_size
    number = torch.arange(size).view(block_size, 1, head_size)
    stored = torch.zeros(2 * size, dtype=torch.int64)
    for power in range(3):
        digit = number // _BASE**power % _BASE
        kv_cache = torch.zeros(1, num_heads, block_size, 2 * head_size, dtype=dtype)
        key = (digit + 1).to(dtype).expand(-1, num_heads, -1).contiguous()
        impl.do_kv_cache_update(attention, key, torch.zeros_like(key), kv_cache, torch.arange(block_size))
        cached = kv_cache[0, 0].flatten().to(torch.int64)
        stored += torch.where(cached > 0, cached - 1, size) * _BASE**power
    place = torch.nonzero(stored < size)[:, 0]
    assert len(place) == size <= _BASE**3, "every number of the keys is stored once"
    order = torch.empty(size, dtype=torch.int64)
    order[stored[place]] = place
    order = order.view(block_size, head_size)
    return order // (2 * head_size), order % (2 * head_size)
