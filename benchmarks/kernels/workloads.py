"""The ops at the shapes of LLaVA-1.5-7B: its vision tower and its decoder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores import triton_block, triton_cls, triton_stats, triton_sums
from ficoco_vllm.kernels.farthest_points import triton as triton_farthest
from ficoco_vllm.kernels.filter_scores import triton as triton_filter
from ficoco_vllm.kernels.partition import triton as triton_partition
from ficoco_vllm.kernels.quantile_merge import triton as triton_merge


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    Attributes:
        floor_bytes: what any implementation must move: each input that counts once, each output once.
        floor_flops: multiplications and additions that the equation asks for in matrix products.
        run: launches the Triton kernels.
    """

    name: str
    floor_bytes: int
    floor_flops: int
    run: Callable[[], Any]


class Shape(NamedTuple):
    """A reducing layer: N, H, d, D and R.

    Attributes:
        first: position of the first visual token: after [CLS], or after the system prompt.
        num_text: text tokens among N; 0 in the tower.
    """

    site: str
    num_tokens: int
    num_heads: int
    head_size: int
    width: int
    num_removed: int
    first: int
    num_text: int


TOWER = Shape("tower", 577, num_heads=16, head_size=64, width=1024, num_removed=42, first=1, num_text=0)
DECODER = Shape(
    "decoder", 636, num_heads=32, head_size=128, width=4096, num_removed=72, first=35, num_text=60
)


class Layer:
    """Random inputs of FiCoCo's ops at its first reducing layer; on the device "meta", their shapes alone.

    Attributes:
        query, key, value: (B, H, N, d), views of one projection, as the tower has them.
        source, target: sources spread over the visual tokens and the rest as targets, both ascending.
        tokens: (B, N, D); in the tower without [CLS], so `merged_source` and `merged_target` are one less.
    """

    def __init__(self, shape: Shape, B: int, dtype: torch.dtype, device: str) -> None:
        self.site, N, H, d, D, R, first, num_text = shape
        self.B, self.device, self.causal, self.scale = B, device, num_text > 0, d**-0.5
        self.num_visual = N - max(num_text, 1)
        self.visual = slice(first, first + self.num_visual)
        qkv = torch.randn((B, N, 3, H, d), dtype=dtype, device=device)
        self.query, self.key, self.value = (qkv[:, :, i].transpose(1, 2) for i in range(3))
        order = torch.arange(N)
        visual = order[self.visual]
        self.leaves = torch.linspace(0, self.num_visual - 1, R).long() + first
        self.stays = visual[~torch.isin(visual, self.leaves)]
        self.source, self.target = self.per_item(self.leaves), self.per_item(self.stays)
        is_visual = torch.isin(order, visual)
        self.text_position = order[~is_visual]
        self.text_rows = self.per_item(self.text_position)
        self.column_weight = self.per_item(is_visual.float())
        cut = 0 if self.causal else 1
        self.tokens = torch.randn((B, N, D), dtype=dtype, device=device)[:, cut:]
        self.merged_source, self.merged_target = self.source - cut, self.target - cut
        self.size = torch.ones(self.tokens.shape[:2], device=device)
        self.correlation = torch.rand((B, R, len(self.stays)), device=device)

    def per_item(self, values: Tensor) -> Tensor:
        """The same values for every item, (B, n)."""
        return values.expand(self.B, -1).contiguous().to(self.device)


def _of_layer(shape: Shape, B: int, dtype: torch.dtype, device: str) -> Iterator[Workload]:
    layer = Layer(shape, B, dtype, device)
    site, N, H, d, D, R, _, T = shape
    P, K, causal, width = layer.num_visual, layer.num_visual - R, layer.causal, dtype.itemsize
    query, key, scale, source, target = layer.query, layer.key, layer.scale, layer.source, layer.target
    lse = torch.full((B, H, N), 7.0, device=device)
    weight = layer.column_weight if causal else None
    text, gamma = (torch.rand((B, T, N), device=device), 0.6) if causal else (None, 1.0)
    pairs = int((layer.stays <= layer.leaves[:, None]).sum()) if causal else R * K
    row_bytes, flops = B * H * d * width, B * H * d * N * (N + 1 if causal else 2 * N)
    block_bytes = (R + K) * row_bytes + B * (4 * R * H + 8 * (R + K) + 4 * R * K + 4 * T * P)
    yield Workload(
        f"softmax_stats/{site}",
        2 * N * row_bytes + 4 * B * N * (H + 1 + causal),
        flops,
        lambda: triton_stats.softmax_stats(query, key, scale, None, causal, None, None, weight, H),
    )
    yield Workload(
        f"attention_sums/{site}",
        2 * N * row_bytes + 4 * B * N * (H + 1),
        flops,
        lambda: triton_sums.attention_sums(query, key, lse, scale, None, causal, H),
    )
    if causal:
        yield Workload(
            f"attention_block(text rows)/{site}",
            (T + N) * row_bytes + B * (4 * T * H + 8 * T + 4 * T * N),
            2 * B * H * int((layer.text_position + 1).sum()) * d,
            lambda: triton_block.attention_block(
                query, key, lse, scale, layer.text_rows, None, None, True, None, 1.0, H
            ),
        )
    else:
        row_sum = torch.randn((B, P), dtype=torch.float64, device=device)
        size, position = torch.ones((B, P), device=device), layer.per_item(torch.arange(P))
        yield Workload(
            f"cls_scores/{site}",
            2 * N * row_bytes + 4 * B * N * (H + 3),
            4 * B * H * N * d,
            lambda: triton_cls.cls_scores(query, key, lse, scale, None, False, H),
        )
        yield Workload(
            f"filter_scores/{site}",
            B * P * (8 + 4 + 8 + 8),
            0,
            lambda: triton_filter.filter_scores(row_sum, size, 0.35, position, (24, 24), (2, 2), 2.0),
        )
        yield Workload(
            f"partition/{site}", B * P * (8 + 8), 0, lambda: triton_partition.partition(row_sum, R)
        )
        distance, first = torch.rand((B, P, P), device=device), layer.per_item(torch.zeros(1).long())[:, 0]
        yield Workload(
            f"farthest_points/{site}",
            B * (4 * K * P + 8 + 4 * P),
            0,
            lambda: triton_farthest.farthest_points(distance, first, K),
        )
    yield Workload(
        f"attention_block{'(Eq. 15)' if causal else ''}/{site}",
        block_bytes,
        2 * B * (pairs * H * d + R * K * T),
        lambda: triton_block.attention_block(
            query, key, lse, scale, source, target, None, causal, text, gamma, H
        ),
    )
    yield Workload(
        f"quantile_merge/{site}",
        B * (P * D * width + K * D * width + 4 * R * K + 4 * (P + K) + 8 * (R + K)),
        2 * B * R * K * D,
        lambda: triton_merge.quantile_merge(
            *(layer.tokens, layer.size, layer.correlation, layer.merged_source, layer.merged_target),
            *(0.998, None, False),
        ),
    )


def workloads(B: int, dtype: torch.dtype = torch.float16, device: str = "meta") -> list[Workload]:
    """Every op of both layers."""
    return [workload for shape in (TOWER, DECODER) for workload in _of_layer(shape, B, dtype, device)]
