"""Helpers of all kernel launchers."""

import struct

import torch
from torch import Tensor


def rows_contiguous(values: Tensor) -> Tensor:
    """Return the values with the last dimension contiguous; copies only if necessary."""
    return values if values.stride(-1) == 1 else values.contiguous()


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of `tl.dot`.

    Single precision is emulated by three products in TF32, which keeps about 21 bits of the 24 and runs on
    the tensor cores; ROCm has no such mode and multiplies in single precision.
    """
    return "tf32x3" if dtype == torch.float32 and torch.version.hip is None else "ieee"


def bits_of(value: float) -> int:
    """The 64 bits of a double, since Triton rounds a floating-point argument to single precision."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
