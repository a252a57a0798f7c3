"""The devices that the kernels are compiled for, and how many programs fit on one of their processors."""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        name: as in the tables.
        target: for the compiler.
        num_processors: streaming multiprocessors.
        shared_bytes: shared memory of one of them.
        cache_bytes: second-level cache.
    """

    name: str
    target: GPUTarget
    num_processors: int
    shared_bytes: int
    cache_bytes: int


# Source: NVIDIA's Ampere, Hopper and Blackwell tuning guides; the limits below are the same for all three.
CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 108, 164 * 1024, 40 * 2**20),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 132, 228 * 1024, 50 * 2**20),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 148, 228 * 1024, 126 * 2**20),
)
AMD = GPUTarget("hip", "gfx942", 64)

_WARPS, _PROGRAMS, _REGISTERS, _REGISTER_UNIT, _RESERVED_SHARED = 64, 32, 65536, 256, 1024


def resident(chip: Chip, num_warps: int, registers: int, shared_bytes: int) -> int:
    """How many programs of a kernel fit on one processor.

    Returns:
        The smallest of the limits of warps, programs, registers and shared memory.
    """
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _WARPS // num_warps,
        _PROGRAMS,
        _REGISTERS // (per_warp * num_warps),
        chip.shared_bytes // (shared_bytes + _RESERVED_SHARED),
    )


def occupancy(num_resident: int, num_warps: int) -> float:
    """Share of a processor's warp slots that are taken."""
    return num_resident * num_warps / _WARPS
