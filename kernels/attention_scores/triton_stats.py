"""Normalisers and row sums of the attention in one pass, without its map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import dot_precision, rows_contiguous
from ficoco_vllm.kernels.tuning import config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softmax_stats_kernel(
    query,
    key,
    lse,
    row_sum,
    weight,
    bias,
    offset,
    query_length,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    bias_stride_b,
    weight_stride_b,
    M,
    N,
    D,
    H,
    group,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """lse_hi = log sum_j exp(logit_hij) and row_sum_hi = sum_j weight_j softmax_hij, in one pass over the keys.

    Grid: (tiles of the queries, H, B). The softmax is the online one in fp32; every sum runs in one program.
    """
    item, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    row_seen = i < M
    num_keys = N
    if query_length is not None:
        row_seen = row_seen & (i < tl.load(query_length + item))
    last = i
    if offset is not None:
        last = last + tl.load(offset + item)
    if CAUSAL:
        reach = tl.max(tl.where(row_seen, last, -1), 0).to(tl.int32) + 1
        num_keys = tl.maximum(tl.minimum(num_keys, reach), 0)

    query_tile = query + item * query_stride_b + h * query_stride_h + i[:, None] * query_stride_m + d[None, :]
    q = tl.load(query_tile, mask=row_seen[:, None] & (d[None, :] < D), other=0.0)
    key_base = key + item * key_stride_b + (h // group) * key_stride_h + d[:, None]
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    part = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        column_seen = j < num_keys
        k = tl.load(
            key_base + j[None, :].to(tl.int64) * key_stride_n,
            mask=column_seen[None, :] & (d[:, None] < D),
            other=0.0,
        )
        logits = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        if bias is not None:
            extra = tl.load(bias + item * bias_stride_b + j, mask=column_seen, other=0.0).to(tl.float32)
            logits += (extra * LOG2E)[None, :]
        seen = row_seen[:, None] & column_seen[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= last[:, None])
        logits = tl.where(seen, logits, float("-inf"))
        above = tl.maximum(highest, tl.max(logits, 1))
        # Until a row has seen a key its maximum is -inf, and -inf - -inf would be NaN.
        anchor = tl.where(above == float("-inf"), 0.0, above)
        weights = tl.exp2(logits - anchor[:, None])
        shrink = tl.exp2(highest - anchor)
        total = total * shrink + tl.sum(weights, 1)
        if weight is not None:
            share = tl.load(weight + item * weight_stride_b + j, mask=column_seen, other=0.0).to(tl.float32)
            part = part * shrink + tl.sum(weights * share[None, :], 1)
        highest = above
    if weight is None:
        part = total
    address = (item * H + h) * M + i
    anchor = tl.where(highest == float("-inf"), 0.0, highest)
    some = total > 0
    result = tl.where(some, (anchor + tl.log2(tl.where(some, total, 1.0))) / LOG2E, float("-inf"))
    tl.store(lse + address, result, mask=i < M)
    tl.store(row_sum + address, tl.where(some, part / tl.where(some, total, 1.0), 0.0), mask=i < M)


def softmax_stats(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    offset: Tensor | None,
    query_length: Tensor | None,
    column_weight: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.softmax_stats`."""
    query, key = rows_contiguous(query), rows_contiguous(key)
    B, H, M, D = query.shape
    lse = torch.empty((B, H, M), dtype=torch.float32, device=query.device)
    row_sum = torch.empty_like(lse)
    bias = None if bias is None else rows_contiguous(bias)
    weight = None if column_weight is None else rows_contiguous(column_weight)
    # Single precision takes four times the shared memory: narrower tiles.
    chosen = config("softmax_stats", query.device, 1 if query.dtype == torch.float32 else 0)
    if lse.numel():
        softmax_stats_kernel[(triton.cdiv(M, chosen.tiles["BLOCK_M"]), H, B)](
            query,
            key,
            lse,
            row_sum,
            weight,
            bias,
            offset,
            query_length,
            *query.stride()[:3],
            *key.stride()[:3],
            0 if bias is None else bias.stride(0),
            0 if weight is None else weight.stride(0),
            M,
            key.shape[2],
            D,
            H,
            H // key.shape[1],
            scale,
            CAUSAL=causal,
            BLOCK_D=triton.next_power_of_2(D),
            PRECISION=dot_precision(query.dtype),
            **chosen.arguments,
        )
    return lse, row_sum.sum(dim=1).div_(num_heads)
