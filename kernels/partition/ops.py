"""The door to the partition."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.partition import eager


def partition(
    redundancy: Tensor,
    num_removed: int,
    *,
    num_kept: int | None = None,
    length: Tensor | None = None,
    removed: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Let the most redundant tokens leave.

    Args:
        redundancy: (B, N) fp32 or fp64, higher leaves first, -inf protects; equal scores leave in index order.
        num_removed: R, the most that any item removes, 0 <= R <= N.
        num_kept: K, the most that any item keeps; None means N - R.
        length: (B,) int32 or int64, how many tokens each item has; None means all.
        removed: (B,) int32 or int64, how many tokens each item removes, at most R and its length; None means
            R.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        source (B, R) and target (B, K) int64, both ascending, -1 behind the last one of an item.

    Raises:
        ValueError: `num_removed` is out of range, or items differ and `num_kept` is not given.

    Source: arXiv:2411.17686, Alg. 1, lines 4-5.
    """
    N = redundancy.shape[1]
    if not 0 <= num_removed <= N:
        raise ValueError(f"num_removed = {num_removed} is not allowed; allowed: 0 to {N}")
    if num_kept is None:
        if length is not None or removed is not None:
            raise ValueError("num_kept is needed where the items differ in length or in what they remove")
        num_kept = N - num_removed
    if not 0 <= num_kept <= N:
        raise ValueError(f"num_kept = {num_kept} is not allowed; allowed: 0 to {N}")
    if not uses_triton(backend, redundancy):
        return eager.partition(redundancy, num_removed, num_kept, length, removed)
    found: tuple[Tensor, Tensor] = _partition(redundancy, num_removed, num_kept, length, removed)
    return found


@torch.library.custom_op("ficoco::partition", mutates_args=())
def _partition(
    redundancy: Tensor, num_removed: int, num_kept: int, length: Tensor | None, removed: Tensor | None
) -> tuple[Tensor, Tensor]:
    from ficoco_vllm.kernels.partition import triton

    return triton.partition(redundancy, num_removed, num_kept, length, removed)


@_partition.register_fake
def _(redundancy, num_removed, num_kept, length, removed):  # type: ignore[no-untyped-def]
    B = redundancy.shape[0]
    source = redundancy.new_empty((B, num_removed), dtype=torch.int64)
    return source, redundancy.new_empty((B, num_kept), dtype=torch.int64)
