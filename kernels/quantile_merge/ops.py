"""Public entry point of the quantile merge: validates arguments and dispatches to torch or Triton."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.quantile_merge import eager


def quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    *,
    epsilon: float,
    fixed_k: int | None = None,
    average: bool = False,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """X_j = (X_j + sum_i alpha_ij X_i) / (1 + sum_i alpha_ij), alpha_ij = C_ij / sum_j C_ij.

    The sums run over the pairs with C_ij >= tau_i, the epsilon-quantile of row i (linear interpolation), or over the
    `fixed_k` largest of a row (the first of equals). The size of source i moves to target j by the share alpha_ij. A
    source whose selected correlations sum to zero is dropped; negative correlations weigh nothing.

    Args:
        tokens: (B, N, D), fp16, bf16 or fp32; sums are taken in fp32.
        size: (B, N) fp32, number of original patches that each token represents.
        correlation: (B, R, K), any floating dtype.
        source: (B, R) int32 or int64 into N, tokens that leave.
        target: (B, K) int32 or int64 into N, tokens that stay.
        epsilon: the quantile that is the threshold, 0 to 1.
        fixed_k: merge each source into exactly this many targets instead (0 prunes); None is token-adaptive.
        average: give every selected pair the weight 1 instead of its share.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        Tokens (B, K, D) in the dtype that came in and size (B, K) fp32.

    Raises:
        ValueError: `epsilon`, `fixed_k` or the shape of `correlation` is not allowed.

    Source: arXiv:2411.17686, Eq. 13; Alg. 1, lines 9-12.
    """
    if not 0.0 <= epsilon <= 1.0:
        raise ValueError(f"epsilon = {epsilon} is not allowed; allowed: 0 to 1")
    if fixed_k is not None and fixed_k < 0:
        raise ValueError(f"fixed_k = {fixed_k} is not allowed; allowed: 0 and above, or None")
    needed = (tokens.shape[0], source.shape[1], target.shape[1])
    if correlation.shape != needed:
        raise ValueError(f"correlation has shape {tuple(correlation.shape)}; needed: {needed}")
    arguments = (tokens, size, correlation, source, target, epsilon, fixed_k, average)
    if not uses_triton(backend, tokens):
        return eager.quantile_merge(*arguments)
    merged: tuple[Tensor, Tensor] = _quantile_merge(*arguments)
    return merged


@torch.library.custom_op("ficoco::quantile_merge", mutates_args=())
def _quantile_merge(
    tokens: Tensor,
    size: Tensor,
    correlation: Tensor,
    source: Tensor,
    target: Tensor,
    epsilon: float,
    fixed_k: int | None,
    average: bool,
) -> tuple[Tensor, Tensor]:
    from ficoco_vllm.kernels.quantile_merge import triton

    return triton.quantile_merge(tokens, size, correlation, source, target, epsilon, fixed_k, average)


@_quantile_merge.register_fake
def _(tokens, size, correlation, source, target, *_rest):  # type: ignore[no-untyped-def]
    B, K = target.shape
    return tokens.new_empty((B, K, tokens.shape[2])), tokens.new_empty((B, K), dtype=torch.float32)
