"""An attention backend whose device work can be captured: vLLM's metadata of TRITON_ATTN, kernels in torch.

vLLM's backend for CPUs plans each step on the host and cannot be captured. Here one operator writes the KV cache and
another reads it. They get what Triton's kernels get, and trust the bounds that the host gave: rows and places beyond
are not computed, and rows of padding are left without a number.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend

_OPS = torch.library.Library("ficoco_test", "DEF")
_OPS.define("write(Tensor key, Tensor value, Tensor(a!) kv_cache, Tensor slots) -> ()")
_OPS.define(
    "attend(Tensor query, Tensor kv_cache, Tensor table, Tensor starts, Tensor lengths, Tensor(a!) output, "
    "int most_rows, int most_places, float scale) -> ()"
)


def write(key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Write the rows that have a slot, (rows, H', d), into the cache, (blocks, H', size, 2 * d)."""
    row = (slots >= 0).nonzero()[:, 0]
    slot, size = slots[row], kv_cache.shape[2]
    kv_cache[slot // size, :, slot % size] = torch.cat([key[row], value[row]], dim=-1)


def attend(
    query: Tensor,
    kv_cache: Tensor,
    table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    output: Tensor,
    most_rows: int,
    most_places: int,
    scale: float,
) -> None:
    """Causal attention of the rows (rows, H, d) of each request to its places in the cache."""
    output.fill_(torch.nan)
    group, d = query.shape[1] // kv_cache.shape[1], query.shape[2]
    for request, length in enumerate(lengths.tolist()):
        first, end = (int(starts[request + place]) for place in (0, 1))
        num_rows, num_places = min(end - first, most_rows), min(length, most_places)
        if num_rows <= 0:
            continue
        blocks = table[request, : -(-num_places // kv_cache.shape[2])].long()
        held = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:num_places].transpose(0, 1)
        key, value = held.repeat_interleave(group, 0).split(d, dim=-1)
        row = torch.arange(num_rows)[:, None] + length - (end - first)
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query[first : first + num_rows].transpose(0, 1),
            key,
            value,
            attn_mask=torch.arange(num_places) <= row,
            scale=scale,
        )
        output[first : first + num_rows] = mixed.transpose(0, 1).reshape(num_rows, *output.shape[1:])


_OPS.impl("write", write, "CPU")
_OPS.impl("attend", attend, "CPU")


class PagedImpl(AttentionImpl[Any]):
    """The layer's part of the backend."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, *_: object, **__: object
    ) -> None:
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.kv_cache_dtype = scale, "auto"

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write as many rows as there are slots."""
        count = len(slot_mapping)
        torch.ops.ficoco_test.write(key[:count], value[:count], kv_cache, slot_mapping)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attention of a step in one layer."""
        if attn_metadata is None:
            return output.fill_(0)
        torch.ops.ficoco_test.attend(
            query,
            kv_cache,
            attn_metadata.block_table,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            output,
            attn_metadata.max_query_len,
            attn_metadata.max_seq_len,
            self.scale,
        )
        return output


class PagedBackend(TritonAttentionBackend):
    """Triton's metadata, with the kernels of this module."""

    @staticmethod
    def get_impl_cls() -> Any:
        """The implementation."""
        return PagedImpl
