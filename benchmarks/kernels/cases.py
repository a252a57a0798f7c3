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
    """One result, two ways, and the attention of the layer alone, which runs anyway, if the result needs it."""

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    eager: Callable[[], tuple[Tensor, ...]]
    attention: Callable[[], Tensor] | None


def tower(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The vision tower's: scores, then the merge."""
    layer = Layer(TOWER, B, dtype, device)
    qk, scale = (layer.query, layer.key), layer.scale

    def normalisers() -> Tensor:
        return kernels.softmax_stats(*qk, scale, backend=backend)[0]

    def scores(lse: Tensor) -> tuple[Tensor, ...]:
        to_others, from_cls, _ = kernels.cls_scores(*qk, lse, scale, backend=backend)
        correlation = kernels.attention_block(
            *qk, lse, scale, row_index=layer.source, column_index=layer.target, backend=backend
        )
        return to_others[:, 1:], from_cls[:, 1:], correlation

    def eager() -> tuple[Tensor, ...]:
        attention = _attention_map(layer)
        return attention[:, 1:, 1:].sum(-1), attention[:, 0, 1:], _pick(attention, layer)

    given = normalisers()
    return [
        Case("scores, normalisers given/tower", lambda: scores(given), eager, lambda: _attention(layer)),
        Case("scores/tower", lambda: scores(normalisers()), eager, lambda: _attention(layer)),
        _merge_case(layer, backend),
    ]


def decoder(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The decoder's: normalisers and row sums in one pass, the text's rows, Eq. 15; then the merge."""
    layer = Layer(DECODER, B, dtype, device)
    qk, scale, visual = (layer.query, layer.key), layer.scale, layer.visual
    common: dict[str, Any] = {"causal": True, "backend": backend}

    def scores() -> tuple[Tensor, ...]:
        lse, row_sum = kernels.softmax_stats(*qk, scale, column_weight=layer.column_weight, **common)
        text = kernels.attention_block(*qk, lse, scale, row_index=layer.text_rows, **common)
        correlation = kernels.attention_block(
            *qk, lse, scale, row_index=layer.source, column_index=layer.target, text=text, gamma=0.6, **common
        )
        return row_sum[:, visual], text.sum(1)[:, visual], correlation

    def eager() -> tuple[Tensor, ...]:
        attention = _attention_map(layer)
        batch = torch.arange(B, device=device)[:, None]
        text = attention[batch, layer.text_rows]
        received = text.transpose(1, 2)
        indirect = received[batch, layer.source] @ received[batch, layer.target].transpose(1, 2)
        correlation = 0.6 * _pick(attention, layer) + 0.4 * indirect
        return attention[:, visual, visual].sum(-1), text.sum(1)[:, visual], correlation

    return [Case("scores/decoder", scores, eager, lambda: _attention(layer)), _merge_case(layer, backend)]


def _attention(layer: Layer) -> Tensor:
    return scaled_dot_product_attention(
        layer.query, layer.key, layer.value, scale=layer.scale, is_causal=layer.causal
    )


def _attention_map(layer: Layer) -> Tensor:
    """Head-mean attention (B, N, N) fp32, by way of the whole (B, H, N, N) map."""
    logits: Tensor = (layer.query @ layer.key.transpose(-1, -2)).float() * layer.scale
    if layer.causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def _pick(attention: Tensor, layer: Layer) -> Tensor:
    """Rows of the sources and columns of the targets in a map (B, N, N), (B, R, K)."""
    batch = torch.arange(len(attention), device=attention.device)[:, None, None]
    return attention[batch, layer.source[:, :, None], layer.target[:, None, :]]


def _merge_case(layer: Layer, backend: Backend) -> Case:
    inputs = (layer.tokens, layer.size, layer.correlation, layer.merged_source, layer.merged_target)
    return Case(
        f"quantile_merge/{layer.site}",
        lambda: kernels.quantile_merge(*inputs, epsilon=0.998, backend=backend),
        lambda: _merge(*inputs),
        None,
    )


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
