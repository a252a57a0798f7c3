"""The attention scores that FiCoCo-V's filter needs, in one pass over queries and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import rows_contiguous
from ficoco_vllm.kernels.tuning import config

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def cls_scores_kernel(
    query,
    key,
    lse,
    bias,
    to_others,
    from_cls,
    mean,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    lse_stride_b,
    lse_stride_h,
    lse_stride_n,
    bias_stride_b,
    N,
    D,
    H,
    group,
    scale,
    one_head,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of each token to all but [CLS], of [CLS] to each token, and the head-mean keys.

    Two dot products a token and head: memory bandwidth sets the time, so BLOCK_H heads are in flight at once. Grid:
    (tiles of the tokens, B); the sum over the heads runs in one program, in a fixed order.
    """
    item = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    own_bias = tl.zeros((BLOCK_N,), tl.float32)
    cls_bias = tl.zeros((), tl.float32)
    if bias is not None:
        own_bias = tl.load(bias + item * bias_stride_b + n, mask=n < N, other=0.0).to(tl.float32)
        cls_bias = tl.load(bias + item * bias_stride_b).to(tl.float32)
    to_sum = tl.zeros((BLOCK_N,), tl.float32)
    from_sum = tl.zeros((BLOCK_N,), tl.float32)
    keys = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H).to(tl.int64)
        at = (h < H)[:, None, None] & (d[None, None, :] < D)
        rows = at & (n < N)[None, :, None]
        query_head = query + item * query_stride_b + h[:, None, None] * query_stride_h + d[None, None, :]
        key_head = key + item * key_stride_b + (h // group)[:, None, None] * key_stride_h + d[None, None, :]
        q = tl.load(query_head + n[None, :, None] * query_stride_n, mask=rows, other=0.0).to(tl.float32)
        k = tl.load(key_head + n[None, :, None] * key_stride_n, mask=rows, other=0.0).to(tl.float32)
        cls_q = tl.load(query_head, mask=at, other=0.0).to(tl.float32)
        cls_k = tl.load(key_head, mask=at, other=0.0).to(tl.float32)
        lse_head = lse + item * lse_stride_b + h[:, None] * lse_stride_h
        valid = (h < H)[:, None] & (n < N)[None, :]
        own = tl.load(lse_head + n[None, :] * lse_stride_n, mask=valid, other=0.0)
        cls = tl.load(lse_head, mask=(h < H)[:, None], other=0.0)
        outward = tl.sum(q * cls_k, 2) * scale + cls_bias - own
        inward = tl.sum(k * cls_q, 2) * scale + own_bias[None, :] - cls
        to_sum += tl.sum(tl.where(valid, tl.exp2(outward * LOG2E), 0.0), 0)
        from_sum += tl.sum(tl.where(valid, tl.exp2(inward * LOG2E), 0.0), 0)
        if mean is not None:
            keys += tl.sum(k, 0)
    tl.store(to_others + item * N + n, 1.0 - (to_sum * one_head).to(tl.float64), mask=n < N)
    tl.store(from_cls + item * N + n, from_sum * one_head, mask=n < N)
    if mean is not None:
        address = mean + (item * N + n[:, None]) * D + d[None, :]
        tl.store(address, keys * one_head, mask=(n < N)[:, None] & (d < D)[None, :])


def cls_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    with_keys: bool,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.cls_scores`."""
    query, key = rows_contiguous(query), rows_contiguous(key)
    bias = None if bias is None else rows_contiguous(bias)
    B, H, N, D = query.shape
    to_others = torch.empty((B, N), dtype=torch.float64, device=query.device)
    from_cls = torch.empty((B, N), dtype=torch.float32, device=query.device)
    mean = torch.empty((B, N, D) if with_keys else (0,), dtype=torch.float32, device=query.device)
    chosen = config("cls_scores", query.device, 1 if D > 64 or query.dtype == torch.float32 else 0)
    if from_cls.numel():
        cls_scores_kernel[(triton.cdiv(N, chosen.tiles["BLOCK_N"]), B)](
            query,
            key,
            lse,
            bias,
            to_others,
            from_cls,
            mean if with_keys else None,
            *query.stride()[:3],
            *key.stride()[:3],
            *lse.stride(),
            0 if bias is None else bias.stride(0),
            N,
            D,
            H,
            H // key.shape[1],
            scale,
            1.0 / num_heads,
            BLOCK_D=triton.next_power_of_2(D),
            **chosen.arguments,
        )
    return to_others, from_cls, mean
