"""The ops at the shapes of LLaVA-1.5-7B: its vision tower and its decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores import triton_block, triton_cls, triton_stats, triton_sums
from ficoco_vllm.kernels.filter_scores import triton as triton_filter
from ficoco_vllm.kernels.partition import triton as triton_partition
from ficoco_vllm.kernels.quantile_merge import triton as triton_merge


@dataclass(frozen=True)
class Workload:
    """One op at one shape.

    Attributes:
        name: op and where it runs.
        floor_bytes: what any implementation must move: each input that counts once, each output once.
        floor_flops: multiplications and additions that the equation asks for in matrix products.
        run: launches the Triton kernels.
        products: whether matrix products dominate, so that tensor cores must serve.
    """

    name: str
    floor_bytes: int
    floor_flops: int
    run: Callable[[], Any]
    products: bool


@dataclass(frozen=True)
class Shape:
    """A reducing layer.

    Attributes:
        num_tokens: of an item, N.
        num_heads: H.
        head_size: d.
        width: D.
        num_removed: R.
        num_text: text tokens among N; 0 in the tower.
    """

    num_tokens: int
    num_heads: int
    head_size: int
    width: int
    num_removed: int
    num_text: int


TOWER = Shape(num_tokens=577, num_heads=16, head_size=64, width=1024, num_removed=42, num_text=0)
DECODER = Shape(num_tokens=636, num_heads=32, head_size=128, width=4096, num_removed=72, num_text=60)
# Where the visual tokens begin in the decoder's prompt, behind the system prompt.
VISUAL_START = 35


def heads(shape: Shape, B: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as views of one projection, as the tower has them, and normalisers."""
    N, H, d = shape.num_tokens, shape.num_heads, shape.head_size
    qkv = torch.randn((B, N, 3, H, d), dtype=dtype, device=device)
    query, key = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    return query, key, torch.full((B, H, N), 7.0, device=device)


def indices(B: int, num_visual: int, R: int, first: int, device: str) -> tuple[Tensor, Tensor]:
    """Sources spread over the visual tokens and the rest as targets, both ascending."""
    source = torch.linspace(0, num_visual - 1, R).long()
    stays = torch.ones(num_visual, dtype=torch.bool)
    stays[source] = False
    target = torch.arange(num_visual)[stays]
    return tuple((index + first).expand(B, -1).contiguous().to(device) for index in (source, target))  # type: ignore[return-value]


def tower(B: int, dtype: torch.dtype = torch.float16, device: str = "meta") -> list[Workload]:
    """FiCoCo-V's ops at its first reducing layer."""
    shape = TOWER
    N, H, d, D, R = shape.num_tokens, shape.num_heads, shape.head_size, shape.width, shape.num_removed
    P = N - 1
    K = P - R
    width = dtype.itemsize
    query, key, lse = heads(shape, B, dtype, device)
    scale = d**-0.5
    source, target = indices(B, P, R, 1, device)
    row_sum = torch.randn((B, P), dtype=torch.float64, device=device)
    position = torch.arange(P).expand(B, P).contiguous().to(device)
    tokens = torch.randn((B, N, D), dtype=dtype, device=device)[:, 1:]
    size, correlation = torch.ones((B, P), device=device), torch.rand((B, R, K), device=device)
    map_bytes = B * H * d * width
    return [
        Workload(
            "softmax_stats/tower",
            2 * N * map_bytes + 4 * B * N * (H + 1),
            2 * B * H * N * N * d,
            lambda: triton_stats.softmax_stats(query, key, scale, None, False, None, None, None, H),
            True,
        ),
        Workload(
            "attention_sums/tower",
            2 * N * map_bytes + 4 * B * N * (H + 1),
            2 * B * H * N * N * d,
            lambda: triton_sums.attention_sums(query, key, lse, scale, None, False, H),
            True,
        ),
        Workload(
            "cls_scores/tower",
            2 * N * map_bytes + 4 * B * N * (H + 2),
            4 * B * H * N * d,
            lambda: triton_cls.cls_scores(query, key, lse, scale, None, False, H),
            False,
        ),
        Workload(
            "attention_block/tower",
            (R + K) * map_bytes + B * (4 * R * H + 8 * (R + K) + 4 * R * K),
            2 * B * H * R * K * d,
            lambda: triton_block.attention_block(
                query, key, lse, scale, source, target, None, False, None, 1.0, H
            ),
            True,
        ),
        Workload(
            "filter_scores/tower",
            B * P * (8 + 4 + 8 + 8),
            0,
            lambda: triton_filter.filter_scores(row_sum, size, 0.35, position, (24, 24), (2, 2), 2.0),
            False,
        ),
        Workload(
            "partition/tower",
            B * P * (8 + 8),
            0,
            lambda: triton_partition.partition(row_sum, R),
            False,
        ),
        Workload(
            "quantile_merge/tower",
            B * (P * D * width + K * D * width + 4 * R * K + 4 * (P + K) + 8 * (R + K)),
            2 * B * R * K * D,
            lambda: triton_merge.quantile_merge(
                tokens, size, correlation, source - 1, target - 1, 0.998, None, False
            ),
            True,
        ),
    ]


def decoder(B: int, dtype: torch.dtype = torch.float16, device: str = "meta") -> list[Workload]:
    """FiCoCo-L's ops at its first reducing layer."""
    shape = DECODER
    N, H, d, D, R, T = (
        shape.num_tokens,
        shape.num_heads,
        shape.head_size,
        shape.width,
        shape.num_removed,
        shape.num_text,
    )
    P = N - T
    K = P - R
    width = dtype.itemsize
    query, key, lse = heads(shape, B, dtype, device)
    scale = d**-0.5
    source, target = indices(B, P, R, VISUAL_START, device)
    leaves, stays = (index[0] for index in indices(1, P, R, VISUAL_START, "cpu"))
    pairs = int((stays <= leaves[:, None]).sum())
    order = torch.arange(N)
    visual = (order >= VISUAL_START) & (order < VISUAL_START + P)
    weight = visual.float().expand(B, N).contiguous().to(device)
    text_rows = order[~visual].expand(B, T).contiguous().to(device)
    text = torch.rand((B, T, N), device=device)
    tokens = torch.randn((B, N, D), dtype=dtype, device=device)
    size, correlation = torch.ones((B, N), device=device), torch.rand((B, R, K), device=device)
    map_bytes = B * H * d * width
    return [
        Workload(
            "softmax_stats/decoder",
            2 * N * map_bytes + 4 * B * N * (H + 2),
            B * H * N * (N + 1) * d,
            lambda: triton_stats.softmax_stats(query, key, scale, None, True, None, None, weight, H),
            True,
        ),
        Workload(
            "attention_sums/decoder",
            2 * N * map_bytes + 4 * B * N * (H + 1),
            B * H * N * (N + 1) * d,
            lambda: triton_sums.attention_sums(query, key, lse, scale, None, True, H),
            True,
        ),
        Workload(
            "attention_block(text rows)/decoder",
            (T + N) * map_bytes + B * (4 * T * H + 8 * T + 4 * T * N),
            2 * B * H * int((order[~visual] + 1).sum()) * d,
            lambda: triton_block.attention_block(
                query, key, lse, scale, text_rows, None, None, True, None, 1.0, H
            ),
            True,
        ),
        Workload(
            "attention_block(Eq. 15)/decoder",
            (R + K) * map_bytes + B * (4 * R * H + 8 * (R + K) + 4 * R * K + 4 * T * P),
            2 * B * (pairs * H * d + R * K * T),
            lambda: triton_block.attention_block(
                query, key, lse, scale, source, target, None, True, text, 0.6, H
            ),
            True,
        ),
        Workload(
            "quantile_merge/decoder",
            B * (P * D * width + K * D * width + 4 * R * K + 4 * (P + K) + 8 * (R + K)),
            2 * B * R * K * D,
            lambda: triton_merge.quantile_merge(
                tokens, size, correlation, source, target, 0.998, None, False
            ),
            True,
        ),
    ]


def workloads(B: int, dtype: torch.dtype = torch.float16, device: str = "meta") -> list[Workload]:
    """All of them."""
    return tower(B, dtype, device) + decoder(B, dtype, device)
