"""CPU fast path for an encoder layer that removes no tokens."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm.model_executor.models.clip import CLIPAttention, CLIPEncoderLayer

from ficoco_vllm.compat import multiplies_bfloat16

# oneDNN cuts a product into blocks of rows. The 577 tokens of one image leave a last block of a single row, which costs
# almost as much as a full one; with four rows in it the whole product takes 6 to 8% less time.
_BLOCK_ROWS = 16
_FILLED_UP = 3
# With more threads, scaled_dot_product_attention, parallel over heads, uses them better than consecutive products.
_MOST_THREADS = 4


def plain_layer(layer: CLIPEncoderLayer, hidden: Tensor) -> Tensor:
    """Run an encoder layer that removes no tokens; the result is that of `layer(hidden)`.

    On a CPU, if the last block of rows would hold a single one, three rows of zeros are added to the matrix products
    that this speeds up, and removed again. Attention never sees them.

    Args:
        layer: of vLLM's tower.
        hidden: (B, N, D), any floating dtype.

    Returns:
        (B, N, D), the dtype of `hidden`.
    """
    B, N, D = hidden.shape
    rows = B * N
    if hidden.device.type != "cpu":
        output: Tensor = layer(hidden)
        return output
    attention = layer.self_attn
    filled = pad(hidden.reshape(rows, D), (0, 0, 0, _FILLED_UP if rows % _BLOCK_ROWS == 1 else 0))
    qkv, _ = attention.qkv_proj(layer.layer_norm1(filled))
    mixed, _ = attention.out_proj(_mix(attention, qkv[:rows].view(B, N, -1)))
    filled[:rows] += mixed.reshape(rows, D)
    output = filled + layer.mlp(layer.layer_norm2(filled))
    return output[:rows].view(B, N, D)


def _mix(attention: CLIPAttention, qkv: Tensor) -> Tensor:
    """The heads' outputs side by side, (B, N, H * d), from (B, N, 3 * H * d)."""
    B, N, _ = qkv.shape
    if not is_faster(qkv):
        output: Tensor = attention.attn(*qkv.chunk(3, dim=-1))
        return output
    heads = qkv.view(B, N, 3, attention.num_heads_per_partition, attention.head_dim)
    query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
    return centred_attention(query, key, value, attention.scale).reshape(B, N, -1)


def is_faster(query: Tensor) -> bool:
    """Whether `centred_attention` takes less time than `scaled_dot_product_attention` does.

    Args:
        query: any shape.
    """
    few = query.device.type == "cpu" and torch.get_num_threads() <= _MOST_THREADS
    return few and query.dtype == torch.bfloat16 and _has_products()


# Cached: the answer never changes, and every layer needs it.
_has_products = cache(multiplies_bfloat16)


def centred_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Softmax attention head by head, with the logits of one head at a time in the cache.

    Unlike in a fused kernel the logits are rounded to bfloat16 between the products. Subtracting the mean of the keys,
    which does not change the softmax, makes them smaller and thereby their rounding errors.

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
