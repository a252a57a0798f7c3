"""Exact order statistics inside a kernel: the bits of the result are determined from the highest down."""

import triton
import triton.language as tl


@triton.jit
def least_bits(WIDE: tl.constexpr):
    """The least integer. No float maps to it; it marks entries outside of the order."""
    if WIDE:
        least = tl.full((), -9223372036854775808, tl.int64)
    else:
        least = tl.full((), -2147483648, tl.int32)
    return least


@triton.jit
def ordered_bits(values):
    """Integers in the order of floats: -0 equals 0, and NaN is above +inf, as in `torch.sort`.

    Args:
        values: any shape, fp32 or fp64.

    Returns:
        The same shape, int32 or int64. No float maps to the least integer.
    """
    values = tl.where(values == 0.0, 0.0, values)
    if values.dtype == tl.float64:
        bits = values.to(tl.int64, bitcast=True)
        bits = tl.where(values != values, 0x7FFFFFFFFFFFFFFF, bits)
        bits = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    else:
        bits = values.to(tl.int32, bitcast=True)
        bits = tl.where(values != values, 0x7FFFFFFF, bits)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits


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
def kth_largest(bits, count, WIDE: tl.constexpr = False):
    """The `count`-th largest integer of each row, by one counting pass over the row for each bit.

    Args:
        bits: (rows, columns) int32, or int64 if `WIDE`; the least integer marks entries that do not take part.
        count: (rows,) int32, 1 for the largest, at most the number of columns that take part.
        WIDE: whether the integers have 64 bits.

    Returns:
        (rows,), an entry of the row.
    """
    result = tl.zeros(count.shape, bits.dtype) + least_bits(WIDE)
    enough = tl.sum((bits >= 0).to(tl.int32), 1) >= count
    result = tl.where(enough, tl.zeros(count.shape, bits.dtype), result)
    HIGHEST: tl.constexpr = 62 if WIDE else 30
    for step in range(HIGHEST + 1):
        candidate = result | (tl.full((), 1, bits.dtype) << (HIGHEST - step))
        enough = tl.sum((bits >= candidate[:, None]).to(tl.int32), 1) >= count
        result = tl.where(enough, candidate, result)
    return result
