"""Timed cases: each result of a reducing layer, by the fused ops and by plain torch code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ficoco_vllm import kernels
from ficoco_vllm.benchmarks.kernels.workloads import DECODER, TOWER, Layer
from ficoco_vllm.kernels import Backend


@dataclass(frozen=True)
class Case:
    """One result, two ways.

    Attributes:
        attention: the attention of the layer alone, which runs anyway; None for results that need none.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    eager: Callable[[], tuple[Tensor, ...]]
    attention: Callable[[], Tensor] | None


def _attention(layer: Layer) -> Tensor:
    return scaled_dot_product_attention(
        layer.query, layer.key, layer.value, scale=layer.scale, is_causal=layer.causal
    )


def _merge_case(layer: Layer, backend: Backend) -> Case:
    inputs = (layer.tokens, layer.size, layer.correlation, layer.merged_source, layer.merged_target)
    return Case(
        f"quantile_merge/{layer.shape.site}",
        lambda: kernels.quantile_merge(*inputs, epsilon=0.998, backend=backend),
        lambda: _merge(*inputs),
        None,
    )


def tower(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The vision tower's: scores, then the merge."""
    layer = Layer(TOWER, B, dtype, device)
    qk = (layer.query, layer.key)

    def normalisers() -> Tensor:
        return kernels.softmax_stats(*qk, layer.scale, backend=backend)[0]

    def scores(lse: Tensor) -> tuple[Tensor, ...]:
        to_others, from_cls, _ = kernels.cls_scores(*qk, lse, layer.scale, backend=backend)
        index: dict[str, Any] = {"row_index": layer.source, "column_index": layer.target}
        correlation = kernels.attention_block(*qk, lse, layer.scale, **index, backend=backend)
        return to_others[:, 1:], from_cls[:, 1:], correlation

    def obvious() -> tuple[Tensor, ...]:
        return _tower_scores(*qk, layer.scale, layer.source, layer.target)

    given = normalisers()
    return [
        Case("scores, normalisers given/tower", lambda: scores(given), obvious, lambda: _attention(layer)),
        Case("scores/tower", lambda: scores(normalisers()), obvious, lambda: _attention(layer)),
        _merge_case(layer, backend),
    ]


def decoder(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The decoder's: normalisers and row sums in one pass, the text's rows, Eq. 15; then the merge."""
    layer = Layer(DECODER, B, dtype, device)
    qk, scale = (layer.query, layer.key), layer.scale

    def scores() -> tuple[Tensor, ...]:
        lse, row_sum = kernels.softmax_stats(
            *qk, scale, causal=True, column_weight=layer.column_weight, backend=backend
        )
        text = kernels.attention_block(
            *qk, lse, scale, row_index=layer.text_rows, causal=True, backend=backend
        )
        index: dict[str, Any] = {"row_index": layer.source, "column_index": layer.target}
        correlation = kernels.attention_block(
            *qk, lse, scale, **index, causal=True, text=text, gamma=0.6, backend=backend
        )
        return row_sum[:, layer.visual], text.sum(1)[:, layer.visual], correlation

    def obvious() -> tuple[Tensor, ...]:
        return _decoder_scores(*qk, scale, layer.source, layer.target, layer.text_rows, layer.visual)

    scored = Case("scores/decoder", scores, obvious, lambda: _attention(layer))
    return [scored, _merge_case(layer, backend)]


def _attention_map(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Head-mean attention (B, M, N) fp32, by way of the whole (B, H, M, N) map."""
    logits = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def _tower_scores(
    query: Tensor, key: Tensor, scale: float, source: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Row sums and [CLS] row of the patches, and the correlation; indices into all tokens."""
    attention = _attention_map(query, key, scale, causal=False)
    return attention[:, 1:, 1:].sum(-1), attention[:, 0, 1:], _pick(attention, source, target)


def _decoder_scores(
    query: Tensor, key: Tensor, scale: float, source: Tensor, target: Tensor, text_rows: Tensor, visual: slice
) -> tuple[Tensor, ...]:
    """Row sums over the visual tokens, what the text gives, and Eq. 15; indices into the prompt."""
    attention = _attention_map(query, key, scale, causal=True)
    batch = torch.arange(len(source), device=source.device)[:, None]
    text = attention[batch, text_rows]
    received = text.transpose(1, 2)
    indirect = received[batch, source] @ received[batch, target].transpose(1, 2)
    correlation = 0.6 * _pick(attention, source, target) + 0.4 * indirect
    return attention[:, visual, visual].sum(-1), text.sum(1)[:, visual], correlation


def _pick(attention: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Rows and columns of a map (B, N, N) by index, (B, R, K)."""
    batch = torch.arange(len(source), device=source.device)[:, None, None]
    return attention[batch, source[:, :, None], target[:, None, :]]


def _merge(
    tokens: Tensor, size: Tensor, correlation: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Eq. 13 line by line."""
    batch = torch.arange(len(source), device=source.device)[:, None]
    threshold = torch.quantile(correlation, 0.998, dim=-1, keepdim=True)
    weight = torch.where(correlation >= threshold, correlation, 0.0)
    alpha = weight / weight.sum(dim=-1, keepdim=True)
    flow = alpha.transpose(1, 2) @ tokens[batch, source].float()
    merged = (tokens[batch, target].float() + flow) / (1 + alpha.sum(dim=1)[..., None])
    moved = size[batch, target] + (alpha * size[batch, source][..., None]).sum(dim=1)
    return merged.to(tokens.dtype), moved
