"""A run of decoder layers that ends between attention and MLP of its last layer; one compiled unit."""

from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ficoco_vllm.decoder.layers import LayerKind

Unit = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, Tensor, Tensor]]


class Segment(nn.Module):
    """The layers between two reductions, from the MLP of one reducing layer to the attention of the next."""

    def __init__(self, before: Any, layers: Sequence[nn.Module], norm: Any, kind: LayerKind) -> None:
        """Share the layers of a decoder.

        Args:
            before: the last layer of the previous segment, whose MLP runs here; None for the first segment.
            layers: vLLM's layers of this segment.
            norm: the decoder's final norm, for the last segment; its last layer runs whole.
            kind: kind of the layers.
        """
        super().__init__()
        self.kind = kind
        self.before: Any = before
        self.whole = nn.ModuleList(layers if norm is not None else layers[:-1])
        self.last: Any = None if norm is not None else layers[-1]
        self.norm: Any = norm

    def forward(
        self, positions: Tensor, hidden: Tensor, deepstack: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layers.

        Args:
            positions: (rows,) int64, original positions; (3, rows) for M-RoPE.
            hidden: (rows, D) residual stream.
            deepstack: features (rows, D) that are added after the first MLPs, one for each.

        Returns:
            Residual stream after the last layer's attention (rows, D), with its queries (rows, H * d) and keys
            (rows, H' * d) after RoPE; for the last segment the decoder's output, repeated three times.
        """
        residual: Tensor | None = None
        if self.before is not None:
            residual = hidden
            hidden = self.before.mlp(self.before.post_attention_layernorm(hidden))
            if deepstack:
                hidden = hidden + deepstack[0]
        for index, layer in enumerate(self.whole, start=0 if self.before is None else 1):
            hidden, residual = layer(positions, hidden, residual)
            if index < len(deepstack):
                hidden = hidden + deepstack[index]
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
        heads = (-1, attention.head_dim)
        query, key = self.kind.before_rope(attention, query.unflatten(-1, heads), key.unflatten(-1, heads))
        query, key = attention.rotary_emb(positions, query.flatten(-2), key.flatten(-2))
        mixed, _ = attention.o_proj(attention.attn(query, key, value))
        return mixed + residual, query, key


def compile_unit(segment: Segment, index: int) -> Unit:
    """Compile one segment for any number of rows.

    Each segment gets a separate code object, the key of torch.compile's cache: all segments share one `forward`, but
    have different layers.

    Args:
        segment: to compile.
        index: index of the segment.
    """
    forward = Segment.forward
    code = forward.__code__.replace(co_name=f"segment_{index}_forward")
    own = FunctionType(code, forward.__globals__, code.co_name)
    unit: Unit = torch.compile(MethodType(own, segment), dynamic=True)
    return unit
