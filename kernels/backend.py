"""Choice between the torch and the Triton implementation of an op."""

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]


def uses_triton(backend: Backend, tensor: Tensor) -> bool:
    """Decide between the two implementations of an op.

    Args:
        backend: "triton" and "torch" are used as given, without a fallback; "auto" takes Triton for
            tensors on a CUDA (or ROCm) device and torch elsewhere.
        tensor: any input of the op.

    Returns:
        Whether the Triton kernels run.

    Raises:
        ValueError: `backend` is none of the three.
    """
    if backend == "auto":
        return tensor.device.type == "cuda"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend = {backend!r} is not allowed; allowed: auto, torch, triton")
    return backend == "triton"


def readable(tensor: Tensor) -> bool:
    """Whether values can be read without a wait for a device and without a break in a traced graph.

    Args:
        tensor: any.
    """
    # A fake tensor is of a class of its own.
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()
