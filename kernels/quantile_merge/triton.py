"""Quantile threshold and weighted merge: a pass over the rows, then one over the targets."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ficoco_vllm.kernels.launching import bits_of, dot_precision, rows_contiguous
from ficoco_vllm.kernels.ordering import floats_of, kth_largest, ordered_bits
from ficoco_vllm.kernels.tuning import config


@triton.jit(do_not_specialize=["epsilon_bits", "fixed_k"])
def row_statistics_kernel(
    correlation,
    tau,
    last,
    total,
    stride_b,
    stride_r,
    R,
    K,
    epsilon_bits,
    fixed_k,
    FIXED: tl.constexpr,
    AVERAGE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Threshold tau_i, last target that a tie with it selects, and sum of the weights, for each source.

    The order statistics are exact: two neighbours of the sorted row, interpolated as `torch.quantile` does.
    Grid: (tiles of the sources, B).
    """
    item = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, BLOCK_K)
    count = tl.zeros((), tl.int32) + K
    seen = (r < R)[:, None] & (j < K)[None, :]
    address = correlation + item * stride_b + r.to(tl.int64)[:, None] * stride_r + j.to(tl.int64)[None, :]
    values = tl.load(address, mask=seen, other=0.0).to(tl.float32)
    bits = tl.where(seen, ordered_bits(values), -2147483648)

    if FIXED:
        needed = tl.zeros((ROWS,), tl.int32) + tl.minimum(fixed_k, count)
        low_bits = kth_largest(bits, needed)
        above = bits > low_bits[:, None]
        tie = bits == low_bits[:, None]
        open_places = needed - tl.sum(above.to(tl.int32), 1)
        taken = tie & (tl.cumsum(tie.to(tl.int32), 1) <= open_places[:, None])
        end = tl.max(tl.where(taken, j[None, :], -1), 1)
        threshold = floats_of(low_bits)
        chosen = above | taken
    else:
        # In double precision: the rank decides which two neighbours are taken.
        epsilon = epsilon_bits.to(tl.int64).to(tl.float64, bitcast=True)
        rank = epsilon * (count - 1).to(tl.float64)
        below = tl.floor(rank)
        fraction = (rank - below).to(tl.float32)
        needed = tl.zeros((ROWS,), tl.int32) + (count - below.to(tl.int32))
        low_bits = kth_largest(bits, needed)
        above = bits > low_bits[:, None]
        next_bits = tl.min(tl.where(above, bits, 2147483647), 1)
        # The entry one place higher equals `low`, unless `low` is the last of its equals.
        alone = (tl.sum(above.to(tl.int32), 1) == needed - 1) & (needed > 1)
        low = floats_of(low_bits)
        high = tl.where(alone, floats_of(next_bits), low)
        gap = high - low
        threshold = tl.where(fraction < 0.5, low + fraction * gap, high - gap * (1.0 - fraction))
        end = tl.zeros((ROWS,), tl.int32) + K
        chosen = seen & (values >= threshold[:, None])
    weight = tl.where(chosen & seen & (values > 0.0), values, 0.0)
    if AVERAGE:
        weight = tl.where(weight > 0.0, 1.0, 0.0)
    out = item * R + r
    tl.store(tau + out, threshold, mask=r < R)
    tl.store(last + out, end, mask=r < R)
    tl.store(total + out, tl.sum(weight, 1), mask=r < R)


@triton.jit
def merge_kernel(
    tokens,
    size,
    correlation,
    source,
    target,
    tau,
    last,
    total,
    merged,
    new_size,
    tokens_stride_b,
    tokens_stride_n,
    size_stride_b,
    correlation_stride_b,
    correlation_stride_r,
    R,
    K,
    D,
    AVERAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X_j = (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij), with the weights recomputed in each tile.

    One program gathers each target: no atomics, the same bits in every run. Grid: (tiles of the features, tiles of the
    targets, B).
    """
    item = tl.program_id(2).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    f = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    staying = j < K
    kept = tl.load(target + item * K + j, mask=staying, other=0).to(tl.int64)
    base = tokens + item * tokens_stride_b + f[None, :]
    sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    weight_sum = tl.zeros((BLOCK_K,), tl.float32)
    moved = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, R, BLOCK_R):
        i = start + tl.arange(0, BLOCK_R)
        leaving = i < R
        left = tl.load(source + item * R + i, mask=leaving, other=0).to(tl.int64)
        seen = leaving[:, None] & staying[None, :]
        row = correlation + item * correlation_stride_b + i.to(tl.int64)[:, None] * correlation_stride_r
        values = tl.load(row + j.to(tl.int64)[None, :], mask=seen, other=0.0).to(tl.float32)
        threshold = tl.load(tau + item * R + i, mask=leaving, other=0.0)[:, None]
        end = tl.load(last + item * R + i, mask=leaving, other=-1)[:, None]
        normaliser = tl.load(total + item * R + i, mask=leaving, other=0.0)
        chosen = (values > threshold) | ((values == threshold) & (j[None, :] <= end))
        weight = tl.where(seen & chosen & (values > 0.0), values, 0.0)
        if AVERAGE:
            weight = tl.where(weight > 0.0, 1.0, 0.0)
        share = weight / tl.where(normaliser > 0.0, normaliser, 1.0)[:, None]
        alpha = share
        if AVERAGE:
            alpha = weight
        weight_sum += tl.sum(alpha, 0)
        sizes = tl.load(size + item * size_stride_b + left, mask=leaving, other=0.0)
        moved += tl.sum(share * sizes[:, None], 0)
        x = tl.load(
            base + left[:, None] * tokens_stride_n, mask=leaving[:, None] & (f < D)[None, :], other=0.0
        )
        flow = tl.trans(alpha)
        high = flow.to(x.dtype)
        sums += tl.dot(high, x, input_precision=PRECISION)
        if x.dtype != tl.float32:
            # A second product with the rounding error of the narrow weights about doubles the digits.
            sums += tl.dot((flow - high.to(tl.float32)).to(x.dtype), x, input_precision=PRECISION)
    own = tl.load(base + kept[:, None] * tokens_stride_n, mask=staying[:, None] & (f < D)[None, :], other=0.0)
    result = (own.to(tl.float32) + sums) / (1.0 + weight_sum)[:, None]
    address = merged + (item * K + j[:, None]) * D + f[None, :]
    tl.store(address, result, mask=staying[:, None] & (f < D)[None, :])
    if tl.program_id(0) == 0:
        own_size = tl.load(size + item * size_stride_b + kept, mask=staying, other=0.0)
        tl.store(new_size + item * K + j, own_size + moved, mask=staying)


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    epsilon: float,
    fixed_k: int | None,
    average: bool,
) -> tuple[Tensor, Tensor]:
    """See `ops.quantile_merge`."""
    tokens, size = rows_contiguous(tokens), rows_contiguous(size)
    correlation = rows_contiguous(correlation)
    source, target = source.contiguous(), target.contiguous()
    B, _, D = tokens.shape
    # Nothing flows where each source merges into no target.
    R, K = 0 if fixed_k == 0 else source.shape[1], target.shape[1]
    tau = torch.empty((B, R), dtype=torch.float32, device=tokens.device)
    last = torch.empty((B, R), dtype=torch.int32, device=tokens.device)
    total = torch.empty_like(tau)
    merged = torch.empty((B, K, D), dtype=tokens.dtype, device=tokens.device)
    new_size = torch.empty((B, K), dtype=torch.float32, device=tokens.device)
    if not merged.numel():
        return merged, new_size
    if R:
        block = triton.next_power_of_2(K)
        chosen = config("row_statistics", tokens.device)
        rows = max(1, chosen.tiles["TILE"] // block)
        row_statistics_kernel[(triton.cdiv(R, rows), B)](
            correlation,
            tau,
            last,
            total,
            correlation.stride(0),
            correlation.stride(1),
            R,
            K,
            bits_of(epsilon),
            0 if fixed_k is None else fixed_k,
            FIXED=fixed_k is not None,
            AVERAGE=average,
            ROWS=rows,
            BLOCK_K=block,
            num_warps=chosen.num_warps,
            enable_fp_fusion=False,  # the threshold rounds as `torch.lerp` does
        )
    chosen = config("merge", tokens.device, 2 if tokens.dtype == torch.float32 else 1 if B >= 8 else 0)
    grid = (triton.cdiv(D, chosen.tiles["BLOCK_D"]), triton.cdiv(K, chosen.tiles["BLOCK_K"]), B)
    merge_kernel[grid](
        tokens,
        size,
        correlation,
        source,
        target,
        tau,
        last,
        total,
        merged,
        new_size,
        tokens.stride(0),
        tokens.stride(1),
        size.stride(0),
        correlation.stride(0),
        correlation.stride(1),
        R,
        K,
        D,
        AVERAGE=average,
        PRECISION=dot_precision(tokens.dtype),
        **chosen.arguments,
    )
    return merged, new_size
