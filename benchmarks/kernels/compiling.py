"""Launches compiled for devices that are not here: registers, memory and instructions of the machine code."""

import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from ficoco_vllm.benchmarks.kernels.recording import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b")
WIDE = re.compile(r"ld\.global[.\w:]*\.v4\.b32|ld\.global[.\w:]*\.v2\.b64|ld\.global[.\w:]*\.v8\.b16")
ASYNC_WIDE = re.compile(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x10")
SINGLE_LOAD = re.compile(r"\bld\.global")


@dataclass(frozen=True)
class Chip:
    """One kind of device: streaming multiprocessors, shared memory of one of them, second-level cache."""

    name: str
    target: GPUTarget
    num_processors: int = 0
    shared_bytes: int = 0
    cache_bytes: int = 0


# Source: NVIDIA's Ampere, Hopper and Blackwell tuning guides; the limits below are the same for all three.
CHIPS = (
    Chip("sm_80", GPUTarget("cuda", 80, 32), 108, 164 * 1024, 40 * 2**20),
    Chip("sm_90", GPUTarget("cuda", 90, 32), 132, 228 * 1024, 50 * 2**20),
    Chip("sm_100", GPUTarget("cuda", 100, 32), 148, 228 * 1024, 126 * 2**20),
)
# Only the spills are read; nothing is predicted.
AMD = Chip("gfx942", GPUTarget("hip", "gfx942", 64))

_WARPS, _PROGRAMS, _REGISTERS, _REGISTER_UNIT, _RESERVED_SHARED = 64, 32, 65536, 256, 1024


@dataclass(frozen=True)
class Code:
    """Compiled code of one specialisation of a kernel for one device.

    Attributes:
        spills: loads and stores of local memory in the machine code; AMD's vector registers that spill to memory.
        tensor_core: instructions of the tensor cores in the PTX.
        wide_loads: loads of 16 bytes in the PTX, synchronous and asynchronous.
        loads: loads from global memory in the PTX.
    """

    spills: int
    registers: int = 0
    shared_bytes: int = 0
    tensor_core: int = 0
    wide_loads: int = 0
    loads: int = 0


@dataclass(frozen=True)
class Compiled:
    """One launch of a workload with its code, and what is predicted of it."""

    workload: str
    launch: Launch
    chip: Chip
    code: Code

    @property
    def num_resident(self) -> int:
        """Programs that fit on one processor: the least limit of warps, programs, registers and memory."""
        num_warps = self.launch.options["num_warps"]
        per_warp = -(-self.code.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        return min(
            _WARPS // num_warps,
            _PROGRAMS,
            _REGISTERS // (per_warp * num_warps),
            self.chip.shared_bytes // (self.code.shared_bytes + _RESERVED_SHARED),
        )


def compile_all(wanted: Sequence[tuple[str, Launch, Chip]]) -> list[Compiled]:
    """Launches of workloads with their code, in order; each specialisation is compiled once, on all cores."""
    distinct = {(launch.specialisation, chip): (launch, chip) for _, launch, chip in wanted}
    # Not forked: Triton and torch have threads.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        codes = dict(zip(distinct, pool.map(_code, *zip(*distinct.values(), strict=True)), strict=True))
    return [Compiled(*one, codes[one[1].specialisation, one[2]]) for one in wanted]


def _code(launch: Launch, chip: Chip) -> Code:
    """Compile one launch and read the properties of its code."""
    made = triton.compile(launch.source(hip=chip == AMD), target=chip.target, options=launch.options)
    if chip == AMD:
        counts = re.findall(r"\.vgpr_spill_count:\s+(\d+)", made.asm["amdgcn"])
        return Code(spills=sum(map(int, counts)))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage, instructions = (
            subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True).stdout
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    line = next(line for line in usage.splitlines() if "REG:" in line)
    used = {name: int(value) for name, value in re.findall(r"\b(REG|SHARED):(\d+)", line)}
    ptx = made.asm["ptx"]
    return Code(
        spills=len(re.findall(r"\b(?:STL|LDL)\b", instructions)),
        registers=used["REG"],
        shared_bytes=max(int(made.metadata.shared), used["SHARED"]),
        tensor_core=len(TENSOR_CORE.findall(ptx)),
        wide_loads=len(WIDE.findall(ptx)) + len(ASYNC_WIDE.findall(ptx)),
        loads=len(SINGLE_LOAD.findall(ptx)) + ptx.count("cp.async.c"),
    )
