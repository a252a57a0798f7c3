"""A layer that reduces nothing, in the way that suits a CPU."""

from torch import Tensor
from torch.nn.functional import pad
from vllm.model_executor.models.clip import CLIPAttention, CLIPEncoderLayer

from ficoco_vllm.vision.centred import centred_attention, is_faster

# oneDNN cuts a product into blocks of rows. A last block of a single row, which the 577 tokens of one image leave,
# costs almost as much as a full one; with four rows in it the whole product takes 6 to 8% less time.
_BLOCK_ROWS = 16
_FILLED_UP = 3


def plain_layer(layer: CLIPEncoderLayer, hidden: Tensor) -> Tensor:
    """A layer that reduces nothing. What it computes is what `layer(hidden)` does.

    On a CPU, where the rows of all images leave one in the last block, three rows of zeros are added to the matrix
    products whose time that changes and cut off again. Attention never sees them.

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
