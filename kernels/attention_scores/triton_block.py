"""Head-mean attention of chosen queries to chosen keys, one tile of the result a program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import dot_precision, rows_contiguous
from ficoco_vllm.kernels.tuning import config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def attention_block_kernel(
    query,
    key,
    lse,
    out,
    row_index,
    column_index,
    bias,
    text,
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
    text_stride_b,
    text_stride_t,
    R,
    K,
    D,
    T,
    H,
    group,
    scale,
    one_head,
    gamma,
    CAUSAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
    TEXT_PRECISION: tl.constexpr,
):
    """out_ij = gamma / H sum_h exp(scale q_hi . k_hj + bias_j - lse_hi) + (1 - gamma) sum_t text_ti text_tj.

    Grid: (tiles of the columns, tiles of the rows, B). Every sum runs in one program, in a fixed order, so
    the result has the same bits in every run.
    """
    item = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    row, column = i, j
    if row_index is not None:
        row = tl.load(row_index + item * R + i, mask=i < R, other=-1).to(tl.int64)
    if column_index is not None:
        column = tl.load(column_index + item * K + j, mask=j < K, other=-1).to(tl.int64)
    # No column is -1, but with `j < K` alone the causal kernel spills two registers on sm_90.
    row_seen, column_seen = (i < R) & (row >= 0), (j < K) & (column >= 0)
    seen = row_seen[:, None] & column_seen[None, :]
    if CAUSAL:
        seen = seen & (column[None, :] <= row[:, None])

    d = tl.arange(0, BLOCK_D)
    query_tile = query + item * query_stride_b + row[:, None] * query_stride_m + d[None, :]
    key_tile = key + item * key_stride_b + column[None, :] * key_stride_n + d[:, None]
    lse_tile = lse + item * lse_stride_b + row * lse_stride_m
    extra = tl.zeros((BLOCK_K,), tl.float32)
    if bias is not None:
        extra = (
            tl.load(bias + item * bias_stride_b + column, mask=column_seen, other=0.0).to(tl.float32) * LOG2E
        )
    query_mask = row_seen[:, None] & (d[None, :] < D)
    key_mask = column_seen[None, :] & (d[:, None] < D)
    # A tile that no query sees (the upper triangle of a causal map) reads no head.
    heads = tl.where(tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0, H, 0)
    total = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    # Within one item 32 bits are enough; the bases above are 64 bits wide.
    for h in range(heads):
        q = tl.load(query_tile + h * query_stride_h, mask=query_mask, other=0.0)
        k = tl.load(key_tile + (h // group) * key_stride_h, mask=key_mask, other=0.0)
        # A query that sees nothing has lse -inf and no attention.
        normaliser = tl.load(lse_tile + h * lse_stride_h, mask=row_seen, other=float("inf"))
        normaliser = tl.where(normaliser == float("-inf"), float("inf"), normaliser)
        logits = tl.dot(q, k, input_precision=PRECISION) * (scale * LOG2E)
        logits = logits + extra[None, :] - (normaliser * LOG2E)[:, None]
        total += tl.exp2(logits)
    total = tl.where(seen, total * one_head, 0.0)

    if text is not None:
        total *= gamma
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            base = text + item * text_stride_b + t[:, None].to(tl.int64) * text_stride_t
            to_source = tl.load(base + row[None, :], mask=(t < T)[:, None] & row_seen[None, :], other=0.0)
            to_target = tl.load(
                base + column[None, :], mask=(t < T)[:, None] & column_seen[None, :], other=0.0
            )
            indirect = tl.dot(tl.trans(to_source), to_target, input_precision=TEXT_PRECISION)
            total += (1.0 - gamma) * indirect
    address = out + (item * R + i[:, None]) * K + j[None, :]
    tl.store(address, total, mask=(i < R)[:, None] & (j < K)[None, :])


def attention_block(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    row_index: Tensor | None,
    column_index: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    text: Tensor | None,
    gamma: float,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_block`."""
    query, key = rows_contiguous(query), rows_contiguous(key)
    B, H, M, D = query.shape
    R = M if row_index is None else row_index.shape[1]
    K = key.shape[2] if column_index is None else column_index.shape[1]
    out = torch.empty((B, R, K), dtype=torch.float32, device=query.device)
    if out.numel() == 0:
        return out
    row_index = None if row_index is None else row_index.contiguous()
    column_index = None if column_index is None else column_index.contiguous()
    bias = None if bias is None else rows_contiguous(bias)
    text = None if text is None else rows_contiguous(text.float())
    padded = D & (D - 1) != 0  # to the next power of two
    if query.dtype == torch.float32:
        default = 5 if padded else 3  # an operand is held as two TF32 numbers
    elif padded:
        default = 3
    else:
        default = 0 if R <= 16 or B * R < 256 else 1 if B * R < 2048 else 2
    chosen = config("attention_block", query.device, default)
    grid = (triton.cdiv(K, chosen.tiles["BLOCK_K"]), triton.cdiv(R, chosen.tiles["BLOCK_R"]), B)
    attention_block_kernel[grid](
        query,
        key,
        lse,
        out,
        row_index,
        column_index,
        bias,
        text,
        *query.stride()[:3],
        *key.stride()[:3],
        *lse.stride(),
        0 if bias is None else bias.stride(0),
        0 if text is None else text.stride(0),
        0 if text is None else text.stride(1),
        R,
        K,
        D,
        0 if text is None else text.shape[1],
        H,
        H // key.shape[1],
        scale,
        1.0 / num_heads,
        gamma,
        CAUSAL=causal,
        BLOCK_D=triton.next_power_of_2(D),
        BLOCK_T=32,
        PRECISION=dot_precision(query.dtype),
        TEXT_PRECISION=dot_precision(torch.float32),
        **chosen.arguments,
    )
    return out
