"""Exact order statistics inside a kernel, by building the bits of the answer from the highest down."""

import triton
import triton.language as tl


@triton.jit
def ordered_bits(values):
    """Integers in the order of floats: -0 equals 0, and NaN stands above +inf, as `torch.sort` has it.

    Args:
        values: any shape, fp32.

    Returns:
        The same shape, int32. No float maps to the least integer.
    """
    values = tl.where(values == 0.0, 0.0, values)
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(values != values, 0x7FFFFFFF, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def floats_of(bits):
    """The floats that `ordered_bits` came from.

    Args:
        bits: any shape, int32.

    Returns:
        The same shape, fp32.
    """
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(bits, count):
    """The `count`-th largest integer of each row, in 32 counts of the row whatever `count` is.

    Args:
        bits: (rows, columns) int32; the least integer marks what does not take part.
        count: (rows,) int32, 1 for the largest, at most the number of columns that take part.

    Returns:
        (rows,) int32, an entry of the row.
    """
    found = tl.full(count.shape, -2147483648, tl.int32)
    enough = tl.sum((bits >= 0).to(tl.int32), 1) >= count
    found = tl.where(enough, 0, found)
    for step in range(31):
        candidate = found | (1 << (30 - step))
        enough = tl.sum((bits >= candidate[:, None]).to(tl.int32), 1) >= count
        found = tl.where(enough, candidate, found)
    return found
