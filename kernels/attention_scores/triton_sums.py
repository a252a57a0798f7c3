"""Sums over the attention map that never write it: row sums and column sums."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.attention_scores.mask import Mask
from ficoco_vllm.kernels.launching import dot_precision, rows_contiguous
from ficoco_vllm.kernels.tuning import config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_sums_kernel(
    outer,
    inner,
    lse,
    out,
    weight,
    bias,
    offset,
    query_length,
    key_length,
    outer_stride_b,
    outer_stride_h,
    outer_stride_n,
    inner_stride_b,
    inner_stride_h,
    inner_stride_n,
    lse_stride_b,
    lse_stride_h,
    lse_stride_m,
    bias_stride_b,
    weight_stride_b,
    M,
    N,
    D,
    H,
    outer_group,
    inner_group,
    scale,
    OVER_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Weighted sums of each head's attention over the inner axis, given the normalisers.

    With OVER_ROWS the outer axis is the keys and the sum runs over the queries ("received"); without it the
    outer axis is the queries. Grid: (tiles of the outer axis, H, B); every sum runs in one program.
    """
    item, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    num_queries, num_keys = N, M
    if not OVER_ROWS:
        num_queries, num_keys = M, N
    if query_length is not None:
        num_queries = tl.minimum(tl.load(query_length + item).to(tl.int32), num_queries)
    if key_length is not None:
        num_keys = tl.minimum(tl.load(key_length + item).to(tl.int32), num_keys)
    num_outer, num_inner = num_keys, num_queries
    if not OVER_ROWS:
        num_outer, num_inner = num_queries, num_keys
    shift = tl.zeros((), tl.int64)
    if offset is not None:
        shift = tl.load(offset + item).to(tl.int64)

    outer_seen = i < num_outer
    outer_tile = outer + item * outer_stride_b + (h // outer_group) * outer_stride_h
    x = tl.load(
        outer_tile + i[:, None] * outer_stride_n + d[None, :],
        mask=outer_seen[:, None] & (d[None, :] < D),
        other=0.0,
    )
    inner_base = inner + item * inner_stride_b + (h // inner_group) * inner_stride_h + d[:, None]
    lse_base = lse + item * lse_stride_b + h * lse_stride_h
    constant = tl.zeros((BLOCK_M,), tl.float32)
    if not OVER_ROWS:
        own = tl.load(lse_base + i * lse_stride_m, mask=outer_seen, other=float("inf"))
        constant -= tl.where(own == float("-inf"), float("inf"), own)
    elif bias is not None:
        constant += tl.load(bias + item * bias_stride_b + i, mask=outer_seen, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = 0
    if CAUSAL:  # tiles of which this one sees nothing are left out
        if OVER_ROWS:
            lowest = (tl.program_id(0) * BLOCK_M - shift).to(tl.int32)
            first = tl.maximum(lowest, 0) // BLOCK_N * BLOCK_N
        else:
            reach = (tl.program_id(0) * BLOCK_M + BLOCK_M + shift).to(tl.int32)
            num_inner = tl.maximum(tl.minimum(num_inner, reach), 0)
    for start in range(first, num_inner, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        inner_seen = j < num_inner
        y = tl.load(
            inner_base + j[None, :].to(tl.int64) * inner_stride_n,
            mask=inner_seen[None, :] & (d[:, None] < D),
            other=0.0,
        )
        logits = tl.dot(x, y, input_precision=PRECISION) * (scale * LOG2E) + (constant * LOG2E)[:, None]
        if OVER_ROWS:
            other = tl.load(lse_base + j.to(tl.int64) * lse_stride_m, mask=inner_seen, other=float("inf"))
            logits -= (tl.where(other == float("-inf"), float("inf"), other) * LOG2E)[None, :]
        elif bias is not None:
            extra = tl.load(bias + item * bias_stride_b + j, mask=inner_seen, other=0.0).to(tl.float32)
            logits += (extra * LOG2E)[None, :]
        seen = outer_seen[:, None] & inner_seen[None, :]
        if CAUSAL:
            if OVER_ROWS:
                seen = seen & (i[:, None] <= j[None, :] + shift)
            else:
                seen = seen & (j[None, :] <= i[:, None] + shift)
        weights = tl.where(seen, tl.exp2(logits), 0.0)
        if weight is not None:
            share = tl.load(weight + item * weight_stride_b + j, mask=inner_seen, other=0.0).to(tl.float32)
            weights *= share[None, :]
        total += tl.sum(weights, 1)
    tl.store(out + (item * H + h) * M + i, total, mask=i < M)


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    axis: int,
    weight: Tensor | None,
    mask: Mask,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_sums`."""
    query, key = rows_contiguous(query), rows_contiguous(key)
    B, H, _, D = query.shape
    group = H // key.shape[1]
    over_rows = axis == 1
    outer, inner = (key, query) if over_rows else (query, key)
    out = torch.empty((B, H, outer.shape[2]), dtype=torch.float32, device=query.device)
    bias = None if mask.bias is None else rows_contiguous(mask.bias)
    weight = None if weight is None else rows_contiguous(weight)
    # Single precision takes four times the shared memory: narrower tiles.
    chosen = config("attention_sums", query.device, 1 if query.dtype == torch.float32 else 0)
    if out.numel():
        attention_sums_kernel[(triton.cdiv(out.shape[2], chosen.tiles["BLOCK_M"]), H, B)](
            outer,
            inner,
            lse,
            out,
            weight,
            bias,
            mask.offset,
            mask.query_length,
            mask.key_length,
            *outer.stride()[:3],
            *inner.stride()[:3],
            *lse.stride(),
            0 if bias is None else bias.stride(0),
            0 if weight is None else weight.stride(0),
            outer.shape[2],
            inner.shape[2],
            D,
            H,
            group if over_rows else 1,
            1 if over_rows else group,
            scale,
            OVER_ROWS=over_rows,
            CAUSAL=mask.causal,
            BLOCK_D=triton.next_power_of_2(D),
            PRECISION=dot_precision(query.dtype),
            **chosen.arguments,
        )
    return out.sum(dim=1).div_(num_heads)
