"""Launches with every optional argument and awkward shapes: they too must compile, on every chip."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from ficoco_vllm.kernels.attention_scores import triton_block, triton_cls, triton_stats, triton_sums
from ficoco_vllm.kernels.farthest_points import triton as triton_farthest
from ficoco_vllm.kernels.filter_scores import triton as triton_filter
from ficoco_vllm.kernels.partition import triton as triton_partition
from ficoco_vllm.kernels.quantile_merge import triton as triton_merge

Calls = dict[str, Callable[[], Any]]
B, N = 3, 301
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def variants() -> Calls:
    """Calls of all variants by name."""
    calls = _selections()
    for d, dtype in product((32, 72, 128), DTYPES):
        calls |= _attention(d, dtype)
    for (R, K, D), dtype in product(((1, 1, 24), (512, 64, 1024), (2000, 880, 4096)), DTYPES):
        calls |= _merges(R, K, D, dtype)
    return calls


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attention(d: int, dtype: torch.dtype) -> Calls:
    """Grouped queries, bias, causal with offsets and lengths, other head sizes; lengths that no tile divides."""
    H, Hk, M = 6, 2, 37
    query, key, lse = _meta(B, H, M, d, dtype=dtype), _meta(B, Hk, N, d, dtype=dtype), _meta(B, H, M)
    bias, weight, text = _meta(B, N, dtype=dtype), _meta(B, N, dtype=dtype), _meta(B, 7, N)
    offset, length = _meta(B, dtype=torch.int64), _meta(B, dtype=torch.int32)
    rows = _meta(B, 5, dtype=torch.int32)
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


def _selections() -> Calls:
    """One term of the filter, fp32 scores."""
    scores, position = _meta(B, N), _meta(B, N, dtype=torch.int64)
    distance, grid = _meta(B, N, N), (24, 24)
    filtered = triton_filter.filter_scores
    return {
        "farthest points": lambda: triton_farthest.farthest_points(distance, position[:, 0], 50),
        "filter": lambda: filtered(scores, None, 0.4, position, grid, (3, 2), 1.5),
        "filter, no penalty": lambda: filtered(None, scores, 0.4, position, grid, None, 2.0),
        "partition": lambda: triton_partition.partition(scores, 50),
        "partition, fp64": lambda: triton_partition.partition(scores.double(), 50),
    }


def _merges(R: int, K: int, D: int, dtype: torch.dtype) -> Calls:
    """Fixed K and averages, few and many targets."""
    tokens, size = _meta(2, R + K, D, dtype=dtype), _meta(2, R + K)
    source, target = _meta(2, R, dtype=torch.int32), _meta(2, K, dtype=torch.int64)
    wide, narrow = _meta(2, R, K), _meta(2, R, K, dtype=dtype)
    merge = triton_merge.quantile_merge
    label = f"R={R},K={K},D={D},{str(dtype).removeprefix('torch.')}"
    return {
        f"merge({label})": lambda: merge(tokens, size, wide, source, target, 0.998, None, False),
        f"merge, average({label})": lambda: merge(tokens, size, narrow, source, target, 0.0, None, True),
        f"merge, fixed({label})": lambda: merge(tokens, size, wide, source, target, 0.0, 3, False),
        f"merge, prune({label})": lambda: merge(tokens, size, wide, source, target, 0.5, 0, True),
    }
