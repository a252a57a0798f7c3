"""What is timed: each result of a reducing layer, by the fused ops and by the obvious way."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ficoco_vllm import kernels
from ficoco_vllm.benchmarks.kernels import naive
from ficoco_vllm.benchmarks.kernels.workloads import DECODER, TOWER, Layer
from ficoco_vllm.kernels import Backend


@dataclass(frozen=True)
class Case:
    """One result, two ways.

    Attributes:
        attention: the attention of the layer alone, which runs anyway; None where none is at stake.
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
        lambda: naive.merge(*inputs),
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
        return naive.tower_scores(*qk, layer.scale, layer.source, layer.target)

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
        return naive.decoder_scores(*qk, scale, layer.source, layer.target, layer.text_rows, layer.visual)

    scored = Case("scores/decoder", scores, obvious, lambda: _attention(layer))
    return [scored, _merge_case(layer, backend)]
