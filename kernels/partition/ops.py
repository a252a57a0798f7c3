"""Public entry point of the partition: validates arguments and dispatches to torch or Triton."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.partition import eager


def partition(redundancy: Tensor, num_removed: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Split tokens into the `num_removed` most redundant ones, which leave, and the rest.

    Args:
        redundancy: (B, N) fp32 or fp64, higher leaves first, -inf protects; equal scores leave in index order.
        num_removed: R, 0 <= R <= N.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        source (B, R) and target (B, N - R) int64, both ascending.

    Raises:
        ValueError: `num_removed` is out of range.

    Source: arXiv:2411.17686, Alg. 1, lines 4-5.
    """
    N = redundancy.shape[1]
    if not 0 <= num_removed <= N:
        raise ValueError(f"num_removed = {num_removed} is not allowed; allowed: 0 to {N}")
    if not uses_triton(backend, redundancy):
        return eager.partition(redundancy, num_removed)
    parts: tuple[Tensor, Tensor] = _partition(redundancy, num_removed)
    return parts


@torch.library.custom_op("ficoco::partition", mutates_args=())
def _partition(redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
    from ficoco_vllm.kernels.partition import triton

    return triton.partition(redundancy, num_removed)


@_partition.register_fake
def _(redundancy, num_removed):  # type: ignore[no-untyped-def]
    B, N = redundancy.shape
    source = redundancy.new_empty((B, num_removed), dtype=torch.int64)
    return source, redundancy.new_empty((B, N - num_removed), dtype=torch.int64)
