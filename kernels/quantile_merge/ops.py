"""The door to the quantile merge."""

from typing import cast

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.quantile_merge import eager
from ficoco_vllm.kernels.quantile_merge.layout import Layout


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    layout: Layout = "cut",
    epsilon: float = 0.998,
    fixed_k: int | None = None,
    average: bool = False,
    ragged: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """X_j = (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij), alpha_ij = C_ij / sum_j C_ij.

    The sums run over the pairs with C_ij >= tau_i, the epsilon-quantile of row i over the targets (linear
    interpolation), or over the `fixed_k` largest of a row (the first of equals). The size of source i moves
    to target j by the share alpha_ij. A source whose selected correlations sum to zero is dropped; negative
    correlations weigh nothing.

    Args:
        tokens: (B, N, D), fp16, bf16 or fp32; sums are taken in fp32.
        size: (B, N) fp32, how many original patches each token stands for.
        correlation: any floating dtype, see `layout`.
        source: (B, R) int32 or int64 into N, tokens that leave; -1 behind the last one of an item.
        target: (B, K) int32 or int64 into N, tokens that stay; -1 behind the last one of an item.
        layout: what the correlation is: "cut" (B, R, K), "rows" (B, R, N) or "map" (B, N, N).
        epsilon: which quantile is the threshold, 0 to 1.
        fixed_k: merge each source into exactly so many targets instead (0 prunes); None is token-adaptive.
        average: give every selected pair the weight 1 instead of its share.
        ragged: whether an index may be -1; the quantile of an item is then taken over its own targets.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        Tokens (B, K, D) in the dtype that came in and size (B, K) fp32, zeros where the target is -1.

    Raises:
        ValueError: `epsilon`, `fixed_k` or the shape of `correlation` is not allowed.

    Source: arXiv:2411.17686, Eq. 13; Alg. 1, lines 9-12.
    """
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon = {epsilon} is not allowed; allowed: 0 to 1")
    if fixed_k is not None and fixed_k < 0:
        raise ValueError(f"fixed_k = {fixed_k} is not allowed; allowed: 0 and above, or None")
    B, N, _ = tokens.shape
    R, K = source.shape[1], target.shape[1]
    shapes = {"cut": (B, R, K), "rows": (B, R, N), "map": (B, N, N)}
    if layout not in shapes or correlation.shape != shapes[layout]:
        raise ValueError(
            f"correlation has shape {tuple(correlation.shape)}; layout {layout!r} of {shapes} does not fit it"
        )
    if not uses_triton(backend, tokens):
        return eager.quantile_merge(
            tokens, size, correlation, source, target, layout, epsilon, fixed_k, average, ragged
        )
    found: tuple[Tensor, Tensor] = _quantile_merge(
        tokens, size, correlation, source, target, layout, epsilon, fixed_k, average
    )
    return found


@torch.library.custom_op("ficoco::quantile_merge", mutates_args=())
def _quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    layout: str,
    epsilon: float,
    fixed_k: int | None,
    average: bool,
) -> tuple[Tensor, Tensor]:
    from ficoco_vllm.kernels.quantile_merge import triton

    return triton.quantile_merge(
        tokens, size, correlation, source, target, cast(Layout, layout), epsilon, fixed_k, average
    )


@_quantile_merge.register_fake
def _(tokens, size, correlation, source, target, *_rest):  # type: ignore[no-untyped-def]
    B, K = target.shape
    return tokens.new_empty((B, K, tokens.shape[2])), tokens.new_empty((B, K), dtype=torch.float32)
