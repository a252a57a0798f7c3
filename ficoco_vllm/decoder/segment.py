"""A run of decoder layers that ends between attention and MLP of its last layer; one compiled unit."""

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

Unit = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Segment(nn.Module):
    """The layers between two reductions, from the MLP of one reducing layer to the attention of the next."""

    def __init__(self, before: Any, layers: Sequence[nn.Module], norm: Any) -> None:
        """Share the layers of a decoder.

        Args:
            before: the last layer of the previous segment, whose MLP runs here; None for the first segment.
            layers: vLLM's Llama layers of this segment.
            norm: the decoder's final norm, for the last segment; its last layer runs whole.
        """
        super().__init__()
        self.before: Any = before
        self.whole = nn.ModuleList(layers if norm is not None else layers[:-1])
        self.last: Any = None if norm is not None else layers[-1]
        self.norm: Any = norm

    def forward(self, positions: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layers.

        Args:
            positions: (rows,) int64, original positions.
            hidden: (rows, D) residual stream.

        Returns:
            Residual stream after the last layer's attention (rows, D), with its queries (rows, H * d) and keys
            (rows, H' * d) after RoPE; for the last segment the decoder's output, repeated three times.
        """
        residual: Tensor | None = None
        if self.before is not None:
            residual = hidden
            hidden = self.before.mlp(self.before.post_attention_layernorm(hidden))
        for layer in self.whole:
            hidden, residual = layer(positions, hidden, residual)
        if self.norm is not None:
            hidden, _ = self.norm(hidden, residual)
            return hidden, hidden, hidden
        norm, attention = self.last.input_layernorm, self.last.self_attn
        if residual is None:
            hidden, residual = norm(hidden), hidden
        else:
            hidden, residual = norm(hidden, residual)
        qkv, _ = attention.qkv_proj(hidden)
        query, key, value = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        query, key = attention.rotary_emb(positions, query, key)
        mixed, _ = attention.o_proj(attention.attn(query, key, value))
        return mixed + residual, query, key


def compile_unit(segment: Segment, index: int) -> Unit:
    """Compile one segment for any number of rows.

    Each segment gets a separate code object, the key of torch.compile's cache: all segments share one `forward`, but
    have different layers.

    Args:
        segment: to compile.
        index: of the segment.
    """
    forward = Segment.forward
    code = forward.__code__.replace(co_name=f"segment_{index}_forward")
    own = FunctionType(code, forward.__globals__, code.co_name)
    unit: Unit = torch.compile(MethodType(own, segment), dynamic=True)
    return unit
