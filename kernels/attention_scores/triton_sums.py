"""Column sums over the attention map, without the map."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import dot_precision, rows_contiguous
from ficoco_vllm.kernels.tuning import config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_sums_kernel(
    query,
    key,
    lse,
    out,
    bias,
    query_stride_b,
    query_stride_h,
    query_stride_m,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    lse_stride_b,
    lse_stride_h,
    lse_stride_m,
    bias_stride_b,
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
    """out_hj = sum_i exp(scale q_hi . k_hj + bias_j - lse_hi): attention that each key receives.

    Tiles have BLOCK_M keys and BLOCK_N queries. Grid: (tiles of the keys, H, B); every sum runs in one program.
    """
    item, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    j = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    key_seen = j < N
    key_tile = (
        key + item * key_stride_b + (h // group) * key_stride_h + j[:, None] * key_stride_n + d[None, :]
    )
    k = tl.load(key_tile, mask=key_seen[:, None] & (d[None, :] < D), other=0.0)
    query_base = query + item * query_stride_b + h * query_stride_h + d[:, None]
    lse_base = lse + item * lse_stride_b + h * lse_stride_h
    constant = tl.zeros((BLOCK_M,), tl.float32)
    if bias is not None:
        constant += tl.load(bias + item * bias_stride_b + j, mask=key_seen, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    first = 0
    if CAUSAL:  # tiles of queries that see none of these keys are left out
        first = tl.program_id(0) * BLOCK_M // BLOCK_N * BLOCK_N
    for start in range(first, M, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        query_seen = i < M
        q = tl.load(
            query_base + i[None, :].to(tl.int64) * query_stride_m,
            mask=query_seen[None, :] & (d[:, None] < D),
            other=0.0,
        )
        logits = tl.dot(k, q, input_precision=PRECISION) * (scale * LOG2E) + (constant * LOG2E)[:, None]
        # A query that sees nothing has lse -inf and no attention.
        normaliser = tl.load(lse_base + i.to(tl.int64) * lse_stride_m, mask=query_seen, other=float("inf"))
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
        logits -= (normaliser * LOG2E)[None, :]
        seen = key_seen[:, None] & query_seen[None, :]
        if CAUSAL:
            seen = seen & (j[:, None] <= i[None, :])
        total += tl.sum(tl.where(seen, tl.exp2(logits), 0.0), 1)
    tl.store(out + (item * H + h) * N + j, total, mask=key_seen)


def attention_sums(
    query: Tensor, key: Tensor, lse: Tensor, scale: float, bias: Tensor | None, causal: bool, num_heads: int
) -> Tensor:
    """See `ops.attention_sums`."""
    query, key = rows_contiguous(query), rows_contiguous(key)
    B, H, M, D = query.shape
    N = key.shape[2]
    out = torch.empty((B, H, N), dtype=torch.float32, device=query.device)
    bias = None if bias is None else rows_contiguous(bias)
    # Single precision takes four times the shared memory: narrower tiles.
    chosen = config("attention_sums", query.device, 1 if query.dtype == torch.float32 else 0)
    if out.numel():
        attention_sums_kernel[(triton.cdiv(N, chosen.tiles["BLOCK_M"]), H, B)](
            query,
            key,
            lse,
            out,
            bias,
            *query.stride()[:3],
            *key.stride()[:3],
            *lse.stride(),
            0 if bias is None else bias.stride(0),
            M,
            N,
            D,
            H,
            H // key.shape[1],
            scale,
            CAUSAL=causal,
            BLOCK_D=triton.next_power_of_2(D),
            PRECISION=dot_precision(query.dtype),
            **chosen.arguments,
        )
    return out.sum(dim=1).div_(num_heads)
