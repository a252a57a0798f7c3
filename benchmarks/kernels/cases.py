"""What is timed: each result of a reducing layer, by the fused ops and by the obvious way."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ficoco_vllm import kernels
from ficoco_vllm.benchmarks.kernels import naive
from ficoco_vllm.benchmarks.kernels.workloads import DECODER, TOWER, VISUAL_START, Shape, indices
from ficoco_vllm.kernels import Backend


@dataclass(frozen=True)
class Case:
    """One result, two ways.

    Attributes:
        name: result and site.
        ours: by the fused ops.
        eager: the obvious way.
        attention: the attention of the layer alone, which runs anyway; None where none is at stake.
    """

    name: str
    ours: Callable[[], tuple[Tensor, ...]]
    eager: Callable[[], tuple[Tensor, ...]]
    attention: Callable[[], Tensor] | None


def _heads(shape: Shape, B: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(B)
    size = (B, shape.num_tokens, 3, shape.num_heads, shape.head_size)
    qkv = torch.randn(size, generator=generator).to(dtype).to(device)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def _merge_case(name: str, shape: Shape, B: int, dtype: torch.dtype, device: str, backend: Backend) -> Case:
    generator = torch.Generator().manual_seed(B)
    num_visual = shape.num_tokens - max(shape.num_text, 1)
    source, target = indices(B, num_visual, shape.num_removed, 0, device)
    tokens = torch.randn((B, num_visual, shape.width), generator=generator).to(dtype).to(device)
    correlation = torch.rand((B, source.shape[1], target.shape[1]), generator=generator).to(device)
    size = torch.ones((B, num_visual), device=device)
    return Case(
        name,
        lambda: kernels.quantile_merge(
            tokens, size, correlation, source, target, epsilon=0.998, backend=backend
        ),
        lambda: naive.merge(tokens, size, correlation, source, target),
        None,
    )


def tower(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The vision tower's: scores, then the merge."""
    shape = TOWER
    query, key, value = _heads(shape, B, dtype, device)
    scale = shape.head_size**-0.5
    source, target = indices(B, shape.num_tokens - 1, shape.num_removed, 0, device)
    lse, _ = kernels.softmax_stats(query, key, scale, backend=backend)

    def scores(normalisers: Tensor) -> tuple[Tensor, ...]:
        to_cls, from_cls, _ = kernels.cls_scores(query, key, normalisers, scale, backend=backend)
        correlation = kernels.attention_block(
            query, key, normalisers, scale, row_index=source + 1, column_index=target + 1, backend=backend
        )
        return 1 - to_cls[:, 1:], from_cls[:, 1:], correlation

    def all_scores() -> tuple[Tensor, ...]:
        return scores(kernels.softmax_stats(query, key, scale, backend=backend)[0])

    def obvious() -> tuple[Tensor, ...]:
        return naive.tower_scores(query, key, scale, source, target)

    def attention() -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=scale)

    return [
        Case("scores, normalisers given/tower", lambda: scores(lse), obvious, attention),
        Case("scores/tower", all_scores, obvious, attention),
        _merge_case("quantile_merge/tower", shape, B, dtype, device, backend),
    ]


def decoder(B: int, dtype: torch.dtype, device: str, backend: Backend) -> list[Case]:
    """The decoder's: normalisers and row sums in one pass, the text's rows, Eq. 15; then the merge."""
    shape = DECODER
    query, key, value = _heads(shape, B, dtype, device)
    scale = shape.head_size**-0.5
    num_visual = shape.num_tokens - shape.num_text
    source, target = indices(B, num_visual, shape.num_removed, VISUAL_START, device)
    order = torch.arange(shape.num_tokens, device=device)
    visual = (order >= VISUAL_START) & (order < VISUAL_START + num_visual)
    column_weight = visual.float().expand(B, -1).contiguous()
    text_rows = order[~visual].expand(B, -1).contiguous()
    part = slice(VISUAL_START, VISUAL_START + num_visual)

    def scores() -> tuple[Tensor, ...]:
        lse, row_sum = kernels.softmax_stats(
            query, key, scale, causal=True, column_weight=column_weight, backend=backend
        )
        text = kernels.attention_block(
            query, key, lse, scale, row_index=text_rows, causal=True, backend=backend
        )
        correlation = kernels.attention_block(
            query,
            key,
            lse,
            scale,
            row_index=source,
            column_index=target,
            causal=True,
            text=text,
            gamma=0.6,
            backend=backend,
        )
        return row_sum[:, part], text.sum(1)[:, part], correlation

    return [
        Case(
            "scores/decoder",
            scores,
            lambda: naive.decoder_scores(query, key, scale, source, target, text_rows, num_visual),
            lambda: scaled_dot_product_attention(query, key, value, scale=scale, is_causal=True),
        ),
        _merge_case("quantile_merge/decoder", shape, B, dtype, device, backend),
    ]
