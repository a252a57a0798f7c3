"""Public entry point of the farthest points: validates arguments and dispatches to torch or Triton."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.backend import Backend, uses_triton
from ficoco_vllm.kernels.farthest_points import eager


def farthest_points(distance: Tensor, first: Tensor, num_kept: int, *, backend: Backend = "auto") -> Tensor:
    """Pick tokens one after another, each the farthest from all picks before it.

    Args:
        distance: (B, N, N) fp32, row i from token i to all others; finite.
        first: (B,) int64, the first pick of each item.
        num_kept: K, 1 <= K <= N.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, N) fp32 redundancy, 0 for the K picks and 1 for the rest. Of equally far tokens the first is picked.

    Raises:
        ValueError: `num_kept` is out of range, or a shape does not fit.

    Source: arXiv:2503.02175, Alg. 1.
    """
    B, N, columns = distance.shape
    if columns != N or first.shape != (B,):
        raise ValueError(
            f"distance {tuple(distance.shape)} and first {tuple(first.shape)} do not fit; needed: (B, N, N), (B,)"
        )
    if not 1 <= num_kept <= N:
        raise ValueError(f"num_kept = {num_kept} is not allowed; allowed: 1 to {N}")
    if not uses_triton(backend, distance):
        return eager.farthest_points(distance, first, num_kept)
    redundancy: Tensor = _farthest_points(distance, first, num_kept)
    return redundancy


@torch.library.custom_op("ficoco::farthest_points", mutates_args=())
def _farthest_points(distance: Tensor, first: Tensor, num_kept: int) -> Tensor:
    from ficoco_vllm.kernels.farthest_points import triton

    return triton.farthest_points(distance, first, num_kept)


@_farthest_points.register_fake
def _(distance, first, num_kept):  # type: ignore[no-untyped-def]
    return distance.new_empty(distance.shape[:2])
