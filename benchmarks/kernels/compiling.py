"""Compiles launches for devices that are not here, and reads registers, memory and instructions of the result."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from ficoco_vllm.benchmarks.kernels.recording import Launch, recorded

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
WIDE = re.compile(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|ld\.global[.\w:]*\.v8\.b16")
ASYNC_WIDE = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10")
SINGLE_LOAD = re.compile(r"\bld\.global")


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
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
    """Programs of a kernel that fit on one processor: the least limit of warps, programs, registers and memory."""
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    return min(
        _WARPS // num_warps,
        _PROGRAMS,
        _REGISTERS // (per_warp * num_warps),
        chip.shared_bytes // (shared_bytes + _RESERVED_SHARED),
    )


@dataclass(frozen=True)
class Code:
    """Compiled code of one specialisation of a kernel for one NVIDIA device.

    Attributes:
        spills: loads and stores of local memory in the machine code.
        tensor_core: instructions of the tensor cores in the PTX.
        wide_loads: loads of 16 bytes in the PTX, synchronous and asynchronous.
        loads: loads from global memory in the PTX.
    """

    registers: int
    shared_bytes: int
    spills: int
    tensor_core: int
    wide_loads: int
    loads: int


@dataclass(frozen=True)
class Compiled(Code):
    """One launch of one specialisation, with what is predicted of it.

    Attributes:
        num_resident: programs that fit on one processor.
        waves: how often the device is filled.
    """

    workload: str
    kernel: str
    chip: str
    num_programs: int
    num_resident: int
    occupancy: float
    waves: float


def compiled(workload: str, launch: Launch, chip: Chip, code: Code) -> Compiled:
    """Combine a launch with its code."""
    num_warps = launch.options["num_warps"]
    fits = resident(chip, num_warps, code.registers, code.shared_bytes)
    return Compiled(
        workload=workload,
        kernel=launch.name,
        chip=chip.name,
        **asdict(code),
        num_programs=launch.num_programs,
        num_resident=fits,
        occupancy=fits * num_warps / _WARPS,
        waves=launch.num_programs / (fits * chip.num_processors),
    )


class Compiler:
    """Compiles each specialisation once, on all cores."""

    def __init__(self, num_workers: int) -> None:
        # Not forked: Triton and torch have threads.
        self._pool = ProcessPoolExecutor(num_workers, get_context("spawn"))
        self._code: dict[tuple[Any, ...], Future[Any]] = {}

    def __enter__(self) -> "Compiler":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def code(self, launch: Launch, chip: Chip) -> "Future[Code]":
        """Compile for an NVIDIA device."""
        return self._once(compile_for, launch, chip)

    def spills_on_amd(self, launch: Launch) -> "Future[int]":
        """Compile for gfx942; the vector registers that spill to memory."""
        return self._once(compile_for_amd, launch)

    def _once(self, function: Callable[..., Any], launch: Launch, *where: Chip) -> "Future[Any]":
        key = (launch.specialisation, *where)
        if key not in self._code:
            self._code[key] = self._pool.submit(function, launch, *where)
        return self._code[key]


def compile_for(launch: Launch, chip: Chip) -> Code:
    """Compile one launch and read the properties of its code."""
    made = triton.compile(launch.source(hip=False), target=chip.target, options=launch.options)
    usage = _resources(made.asm["cubin"])
    ptx = made.asm["ptx"]
    asynchronous = len(ASYNC_WIDE.findall(ptx))
    return Code(
        registers=usage["REG"],
        shared_bytes=max(int(made.metadata.shared), usage["SHARED"]),
        spills=usage["SPILLS"],
        tensor_core=len(TENSOR_CORE.findall(ptx)),
        wide_loads=len(WIDE.findall(ptx)) + asynchronous,
        loads=len(SINGLE_LOAD.findall(ptx)) + ptx.count("cp.async.c"),
    )


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers and shared memory of the one kernel in a cubin, and its instructions on local memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    line = next(line for line in usage.splitlines() if "REG:" in line)
    found = {name: int(value) for name, value in re.findall(r"\b(REG|SHARED):(\d+)", line)}
    return found | {"SPILLS": len(re.findall(r"\b(?:STL|LDL)\b", code))}


def compile_for_amd(launch: Launch) -> int:
    """Compile one launch for gfx942; returns the vector registers that spill to memory."""
    made = triton.compile(launch.source(hip=True), target=AMD, options=launch.options)
    return sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"]))


def launches_of(run: Callable[[], Any]) -> list[Launch]:
    """What a call would launch."""
    with recorded() as launches:
        run()
    return launches
