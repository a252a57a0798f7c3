"""transformers' language models, run segment by segment; the reductions are those of the server's decoder."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from ficoco_vllm.decoder.attention import DecoderHeads
from ficoco_vllm.decoder.boundary import Boundary, Part, boundary, num_rows
from ficoco_vllm.decoder.layers import LAYER_KINDS
from ficoco_vllm.decoder.reduction import Rows, reduce_rows
from ficoco_vllm.hf.batch import padded
from ficoco_vllm.planning.decoder import DecoderPlanner, RequestPlan
from ficoco_vllm.vision.tower import without_autocast


class Output(NamedTuple):
    """Tokens after the last layer.

    Attributes:
        hidden: (B, longest, D), padded on the left.
        valid: (B, longest) false where padded.
        origin: (tokens,) int64, the row of each among the tokens that entered.
        held: tokens in the KV cache of each segment, (B, length) bool, false for padding.
    """

    hidden: Tensor
    valid: Tensor
    origin: Tensor
    held: list[Tensor]


class SegmentedModel:
    """View of a language model, cut into the planner's segments. It owns no weights."""

    def __init__(self, model: Any, planner: DecoderPlanner, grid: tuple[int, int]) -> None:
        """Share the layers of a model.

        Args:
            model: transformers' model of a type in `LAYER_KINDS`.
            planner: planner of the decoder.
            grid: rows and columns of an unreduced image.
        """
        self.model, self.planner, self.grid = model, planner, grid
        self.kind = LAYER_KINDS[model.config.model_type]

    def __call__(
        self,
        hidden: Tensor,
        valid: Tensor,
        position: Tensor,
        past: list[Tensor],
        cache: Any,
        plans: list[RequestPlan] | None = None,
        **kwargs: Any,
    ) -> Output:
        """Run all layers.

        Args:
            hidden: (B, S, D) embeddings, padded on the left.
            valid: (B, S) false where padded.
            position: (B, S) int64.
            past: tokens in the KV cache of each segment, (B, length) bool, false for padding.
            cache: cache of transformers, or None.
            plans: plans of the prompts that are reduced now; None keeps all tokens.
            **kwargs: arguments of the layers.

        Source: arXiv:2411.17686, Alg. 2.
        """
        segments, model = self.planner.segments, self.model
        starts = [0, *valid.sum(dim=1).cumsum(0).tolist()] if plans else []
        parts = [Part(plan, 0, plan.num_prompt_tokens) for plan in plans or ()]
        positions = position[valid]
        origin = torch.arange(len(positions), device=hidden.device)
        size = torch.ones(len(positions), dtype=torch.float32, device=hidden.device)
        held = []
        for segment in range(segments.num_segments):
            held.append(torch.cat([past[segment], valid], dim=1))
            first = segment * segments.size
            inputs = {
                "attention_mask": create_causal_mask(
                    config=model.config,
                    inputs_embeds=hidden,
                    attention_mask=held[-1],
                    past_key_values=cache,
                    position_ids=position,
                    layer_idx=first,
                ),
                "position_embeddings": model.rotary_emb(hidden, position_ids=position),
                "past_key_values": cache,
                **kwargs,
            }
            edge = None
            if parts and segment < segments.num_segments - 1:
                edge = boundary(starts, parts, segment, self._needs_equal_text)
            for layer in model.layers[first : segments.end(segment) + (not (edge and edge.groups))]:
                hidden = layer(hidden, position_ids=position, use_cache=cache is not None, **inputs)
            if not (edge and edge.groups):
                continue
            layer = model.layers[segments.end(segment)]
            hidden, heads = self._attend(layer, hidden, valid, **inputs)
            rows = self._reduce(Rows(hidden[valid], origin, size), heads, edge)
            origin, size = rows.origin, rows.size
            counts = num_rows(starts, parts, segment + 1)
            hidden, valid = padded(rows.hidden, counts)
            position, _ = padded(positions.to(origin.device)[origin], counts)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return Output(model.norm(hidden), valid, origin, held)

    def _attend(
        self,
        layer: Any,
        hidden: Tensor,
        valid: Tensor,
        attention_mask: Any,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, DecoderHeads]:
        """The first half of a layer, and queries and keys of the tokens for measuring attention.

        Source: transformers, `LlamaAttention.forward`.
        """
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (-1, attention.head_dim))
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        query, key = self.kind.before_rope(attention, query, key)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        keys, values = key, value
        if past_key_values is not None:
            keys, values = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager_attention_forward
        )
        mixed, _ = attend(
            attention, query, keys, values, attention_mask, dropout=0.0, scaling=attention.scaling, **kwargs
        )
        projected = attention.o_proj(mixed.reshape(*hidden.shape[:-1], -1))
        heads = DecoderHeads(
            query=query.transpose(1, 2)[valid],
            key=key.transpose(1, 2)[valid],
            scale=attention.scaling,
            num_heads=attention.config.num_attention_heads,
            backend=self.planner.config.backend,
        )
        return hidden + projected, heads

    def _reduce(self, rows: Rows, heads: DecoderHeads, edge: Boundary) -> Rows:
        with without_autocast(rows.hidden.device):
            return reduce_rows(rows, heads, edge, self.planner, self.grid)

    def _needs_equal_text(self, method: str) -> bool:
        return "text_features" in self.planner.reducer(method).signals
