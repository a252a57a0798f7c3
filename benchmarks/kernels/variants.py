"""Launches with every optional argument and awkward shapes: they too must compile, on every chip."""

from collections.abc import Callable
from typing import Any

import torch

from ficoco_vllm.kernels.attention_scores import triton_block, triton_cls, triton_stats, triton_sums
from ficoco_vllm.kernels.farthest_points import triton as triton_farthest
from ficoco_vllm.kernels.filter_scores import triton as triton_filter
from ficoco_vllm.kernels.partition import triton as triton_partition
from ficoco_vllm.kernels.quantile_merge import triton as triton_merge


def attention(d: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Grouped queries, bias, causal with offsets and lengths, other head sizes; lengths that no tile divides."""
    B, H, Hk, M, N = 3, 6, 2, 37, 301
    query = torch.empty((B, H, M, d), dtype=dtype, device="meta")
    key = torch.empty((B, Hk, N, d), dtype=dtype, device="meta")
    lse = torch.empty((B, H, M), device="meta")
    bias = torch.empty((B, N), dtype=dtype, device="meta")
    length = torch.empty(B, dtype=torch.int32, device="meta")
    offset = torch.empty(B, dtype=torch.int64, device="meta")
    rows = torch.empty((B, 5), dtype=torch.int32, device="meta")
    text = torch.empty((B, 7, N), device="meta")
    weight = torch.empty((B, N), dtype=dtype, device="meta")
    label = f"d={d},{str(dtype).removeprefix('torch.')}"
    return {
        f"stats({label})": lambda: triton_stats.softmax_stats(
            query, key, 0.1, bias, True, offset, length, weight, H
        ),
        f"sums({label})": lambda: triton_sums.attention_sums(query, key, lse, 0.1, bias, True, H),
        f"block({label})": lambda: triton_block.attention_block(
            query, key, lse, 0.1, rows, None, bias, True, text, 0.6, H
        ),
        f"whole map({label})": lambda: triton_block.attention_block(
            query, key, lse, 0.1, None, None, None, False, None, 1.0, H
        ),
        f"cls({label})": lambda: triton_cls.cls_scores(query, key[:, :, :M], lse, 0.1, bias[:, :M], True, H),
    }


def others() -> dict[str, Callable[[], Any]]:
    """One term of the filter, fp32 scores, fixed K and averages, few and many targets."""
    B, N = 3, 301
    scores = torch.empty((B, N), device="meta")
    position = torch.empty((B, N), dtype=torch.int64, device="meta")
    distance, first = torch.empty((B, N, N), device="meta"), position[:, 0]
    calls: dict[str, Callable[[], Any]] = {
        "farthest points": lambda: triton_farthest.farthest_points(distance, first, 50),
        "filter": lambda: triton_filter.filter_scores(scores, None, 0.4, position, (24, 24), (3, 2), 1.5),
        "filter, no penalty": lambda: triton_filter.filter_scores(
            None, scores, 0.4, position, (24, 24), None, 2.0
        ),
        "partition": lambda: triton_partition.partition(scores, 50),
        "partition, fp64": lambda: triton_partition.partition(scores.double(), 50),
    }
    for R, K, D in ((1, 1, 24), (512, 64, 1024), (2000, 880, 4096)):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            calls |= _merges(R, K, D, dtype)
    return calls


def _merges(R: int, K: int, D: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    B, N = 2, R + K
    tokens = torch.empty((B, N, D), dtype=dtype, device="meta")
    size = torch.empty((B, N), device="meta")
    source = torch.empty((B, R), dtype=torch.int32, device="meta")
    target = torch.empty((B, K), dtype=torch.int64, device="meta")
    wide = torch.empty((B, R, K), device="meta")
    narrow = torch.empty((B, R, K), dtype=dtype, device="meta")
    merge = triton_merge.quantile_merge
    label = f"R={R},K={K},D={D},{str(dtype).removeprefix('torch.')}"
    return {
        f"merge({label})": lambda: merge(tokens, size, wide, source, target, 0.998, None, False),
        f"merge, average({label})": lambda: merge(tokens, size, narrow, source, target, 0.0, None, True),
        f"merge, fixed({label})": lambda: merge(tokens, size, wide, source, target, 0.0, 3, False),
        f"merge, prune({label})": lambda: merge(tokens, size, wide, source, target, 0.5, 0, True),
    }


def variants() -> dict[str, Callable[[], Any]]:
    """All of them by name."""
    calls = others()
    for d in (32, 72, 128):
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            calls |= attention(d, dtype)
    return calls
