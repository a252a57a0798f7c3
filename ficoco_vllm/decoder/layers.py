"""Decoders whose layers can be run in segments, in vLLM and in transformers.

Their layers have the same parts under the same names in both: `input_layernorm`, `self_attn` with `o_proj`, `head_dim`
and `scaling`, `post_attention_layernorm` and `mlp`. What differs is how queries and keys are made before RoPE. A
decoder of another kind is a row of `LAYER_KINDS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerKind:
    """The layers of one decoder.

    Attributes:
        head_norms: whether queries and keys pass a norm of their head, `q_norm` and `k_norm`, before RoPE.
    """

    head_norms: bool = False

    def before_rope(self, attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys as they enter RoPE.

        Args:
            attention: attention module of a layer.
            query: (..., H, d), projected, with any bias.
            key: (..., H', d).

        Returns:
            Tensors of the same shapes.
        """
        return (attention.q_norm(query), attention.k_norm(key)) if self.head_norms else (query, key)


# Model type of the language model's configuration to its layers.
LAYER_KINDS: Mapping[str, LayerKind] = {
    "llama": LayerKind(),
    "mistral": LayerKind(),
    "qwen2": LayerKind(),
    "qwen3": LayerKind(head_norms=True),
    # Mixtures of experts differ in their `mlp` alone, which is called as it is.
    "qwen3_moe": LayerKind(head_norms=True),
    # M-RoPE, whose positions have three rows, and deepstack features: see `Segment` and `DecoderPlanner.first_layer`.
    "qwen3_vl_text": LayerKind(head_norms=True),
    "qwen3_vl_moe_text": LayerKind(head_norms=True),
}
# Fields of a configuration that change the attention of a known layer, and why such a layer cannot be reduced.
_EXCLUDED = {
    "sliding_window": (
        "attends to the last {value} tokens only, which a layer counts after the reduction; allowed: full attention "
        "(vLLM: --disable-sliding-window, which limits --max-model-len to {value})"
    ),
    "dual_chunk_attention_config": "attends in chunks of positions; allowed: full attention",
    "llama_4_scaling": "scales queries by their position, which is not supported",
    "qk_norm": "has norms of queries and keys that are not supported",
}


def why_not_reducible(text_config: Any) -> str | None:
    """Reason why a decoder cannot be reduced; None if it can.

    Args:
        text_config: transformers' configuration of the language model.
    """
    kind = text_config.model_type
    if kind not in LAYER_KINDS:
        known = ", ".join(repr(name) for name in LAYER_KINDS)
        return f"the decoder is {kind!r}; allowed: {known}"
    for field, reason in _EXCLUDED.items():
        value = getattr(text_config, field, None)
        if value:
            return f"the decoder ({kind!r}) {reason.format(value=value)}"
    return None
