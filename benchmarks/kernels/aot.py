"""Compile every kernel ahead of time, without a GPU, and check registers, spills, memory and traffic against bars.

    python -m ficoco_vllm.benchmarks.kernels.aot [--json OUT.json] [--defaults]

The launchers run on meta tensors at the shapes of LLaVA-1.5-7B; the kernels that they would launch are compiled for
three NVIDIA generations and for AMD's gfx942, and so are other types and awkward shapes; with
`--defaults` only what LLaVA-1.5-7B launches in fp16, for NVIDIA. Each bar is a line
`BAR name measured limit PASS|FAIL`; the exit status is 1 if one fails.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, print_table
from ficoco_vllm.benchmarks.harness.results import report as report_bars
from ficoco_vllm.benchmarks.kernels.compiling import CHIPS, Chip, Compiled, Compiler, compiled, launches_of
from ficoco_vllm.benchmarks.kernels.recording import Launch
from ficoco_vllm.benchmarks.kernels.variants import variants
from ficoco_vllm.benchmarks.kernels.workloads import Workload, workloads

BATCHES = (1, 8, 32)
BYTES_LIMIT = 1.25
# Kernels whose programs along the first axes of the grid read the same data: how many axes, and over how many
# steps of a loop they walk through it side by side (the heads of the tower, the smaller model).
SHARING = {"attention_block_kernel": (2, 16), "merge_kernel": (2, 1)}
# While programs walk side by side through the heads, the data of this many heads is live: the pipeline and its skew.
LIVE_STEPS = 4
# Kernels that live off matrix products of what they load.
PRODUCT_KERNELS = ("softmax_stats_kernel", "attention_sums_kernel", "attention_block_kernel", "merge_kernel")


@contextmanager
def traffic() -> Iterator[Callable[[], dict[str, dict[str, Any]]]]:
    """Counts at B = 1, out of a process whose kernels are interpreted while this one compiles."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traffic.json"
        command = [sys.executable, "-m", "ficoco_vllm.benchmarks.kernels.traffic", str(path)]
        with subprocess.Popen(command, env=os.environ | {"TRITON_INTERPRET": "1"}) as process:

            def counts() -> dict[str, dict[str, Any]]:
                if process.wait():
                    raise subprocess.CalledProcessError(process.returncode, command)
                found: dict[str, dict[str, Any]] = json.loads(path.read_text())
                return found

            try:
                yield counts
            finally:
                process.terminate()


def moved_bytes(
    B: int, counts: dict[str, Any], launches: list[Launch], chip: Chip, codes: list[Compiled]
) -> tuple[int, int]:
    """Bytes from and to device memory, and the most data that must stay in the second-level cache for that.

    Items share nothing, so the counts of one item hold for each. Programs that share data run together: if
    what they share fits into the cache, it is read once; if not, every request goes to memory.
    """
    total, most = B * counts["torch_bytes"], 0
    for launch, made, count in zip(launches, codes, counts["launches"], strict=True):
        axes, steps = SHARING.get(launch.name, (1, 1))
        together = int(torch.Size(launch.grid[:axes]).numel())
        groups = launch.num_programs // together
        in_flight = min(groups, -(-made.num_resident * chip.num_processors // together))
        walked = min(1.0, LIVE_STEPS / steps)
        live = int(in_flight * count["moved_bytes"] * B / groups * walked)
        total += B * count["moved_bytes" if live <= chip.cache_bytes else "requested_bytes"]
        most = max(most, live)
    return total, most


def summed(counts: dict[str, Any], name: str) -> int:
    """One count over the launches of a workload."""
    return sum(count[name] for count in counts["launches"])


def distinct(made: list[Compiled]) -> list[Compiled]:
    """The first of those that differ in the number of programs only."""
    names = ("workload", "kernel", "chip", "registers", "shared_bytes", "loads")
    return list({attrgetter(*names)(c): c for c in reversed(made)}.values())[::-1]


def report(made: list[Compiled], moved: list[dict[str, Any]], amd_spills: dict[str, int]) -> int:
    """Print tables and bars; returns the exit status, 1 if a bar fails."""
    print("\nCompiled (programs, resident ones, occupancy and waves are predicted)")
    print_table(
        [
            *("op", "kernel", "chip", "regs", "shared", "spill", "tensor", "wide/loads"),
            *("programs", "resident", "occ", "waves"),
        ],
        [
            (
                *(c.workload, c.kernel, c.chip, c.registers, c.shared_bytes, c.spills, c.tensor_core),
                *(f"{c.wide_loads}/{c.loads}", c.num_programs, c.num_resident),
                *(f"{c.occupancy:.0%}", f"{c.waves:.2f}"),
            )
            for c in made
        ],
    )
    print("\nBytes and operations (counted in the interpreter at B = 1; live: needed in the L2 cache)")
    megabytes = ("floor_bytes", "moved_bytes", "requested_bytes", "live_bytes")
    print_table(
        [
            *("op", "chip", "B", "floor MB", "moved MB", "requested MB", "live MB", "ratio"),
            *("GFLOP floor", "GFLOP done"),
        ],
        [
            (
                *(m["workload"], m["chip"], m["B"], *(f"{m[name] / 1e6:.3f}" for name in megabytes)),
                *(f"{m['ratio']:.3f}", f"{m['floor_flops'] / 1e9:.3f}", f"{m['flops'] / 1e9:.3f}"),
            )
            for m in moved
        ],
    )
    print()
    bars = list(_bars(made, moved, amd_spills))
    status = report_bars(bars)
    print(f"{sum(bar.passed for bar in bars)} of {len(bars)} bars hold")
    return status


def _bars(made: list[Compiled], moved: list[dict[str, Any]], amd_spills: dict[str, int]) -> Iterator[Bar]:
    for c in made:
        place = f"[{c.workload},{c.kernel},{c.chip}]"
        yield at_most(f"spills{place}", c.spills)
        yield Bar(f"fits{place}", c.num_resident, 1)
        if "/" not in c.workload:  # a variant, whose rows need not be aligned
            continue
        if c.kernel in PRODUCT_KERNELS:
            yield Bar(f"tensor_core{place}", c.tensor_core, 1)
        if c.kernel in (*PRODUCT_KERNELS, "cls_scores_kernel"):
            yield Bar(f"wide_loads{place}", c.wide_loads, 1)
    for name, count in amd_spills.items():
        yield at_most(f"spills[{name},gfx942]", count)
    for m in moved:
        yield at_most(f"bytes[{m['workload']},{m['chip']},B={m['B']}]", m["ratio"], BYTES_LIMIT)


def main() -> int:
    """Compile, count, print the tables and the bars; returns 1 if a bar fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the figures are written")
    parser.add_argument("--defaults", action="store_true", help="only LLaVA-1.5-7B in fp16 on NVIDIA")
    arguments = parser.parse_args()
    start = time.perf_counter()
    with traffic() as counts, Compiler(os.cpu_count() or 1) as compiler:
        launched = [(B, workload, launches_of(workload.run)) for B in BATCHES for workload in workloads(B)]
        wanted = [
            (workload.name, launch, chip, compiler.code(launch, chip))
            for _, workload, launches in launched
            for chip in CHIPS
            for launch in launches
        ]
        amd = []
        if not arguments.defaults:
            amd = [
                (f"{workload.name},{launch.name}", compiler.spills_on_amd(launch))
                for _, workload, launches in launched
                for launch in launches
            ]
            wanted += [(*one, compiler.code(*one[1:])) for one in others()]
        made = [compiled(name, launch, chip, code.result()) for name, launch, chip, code in wanted]
        amd_spills: dict[str, int] = {}
        for name, spills in amd:
            amd_spills[name] = max(amd_spills.get(name, 0), spills.result())
        moved = movement(launched, counts(), made)
    made = distinct(made)
    status = report(made, moved, amd_spills)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"compiled": [asdict(one) for one in made], "moved": moved, "amd_spills": amd_spills}
        arguments.json.write_text(json.dumps(figures, indent=1))
    return status


def others() -> Iterator[tuple[str, Launch, Chip]]:
    """Other types at the same shapes, and every optional argument at awkward ones."""
    for dtype in (torch.bfloat16, torch.float32):
        for workload in workloads(1, dtype):
            label = f"{workload.name} {str(dtype).removeprefix('torch.')}"
            for launch in launches_of(workload.run):
                # The chip with the least shared memory, and the one whose instructions differ most from it.
                yield from ((label, launch, chip) for chip in CHIPS[:2])
    for name, run in variants().items():
        yield from ((name, launch, CHIPS[0]) for launch in launches_of(run))


def movement(
    launched: list[tuple[int, Workload, list[Launch]]],
    counts: dict[str, dict[str, Any]],
    made: list[Compiled],
) -> list[dict[str, Any]]:
    """Bytes and operations of each workload at each batch on each chip, against the floor.

    Args:
        launched: batch, workload and its launches.
        counts: of the interpreter at B = 1.
        made: of these launches first, in order, chip by chip.
    """
    moved = []
    found = iter(made)
    for B, workload, launches in launched:
        count = counts[workload.name]
        for chip in CHIPS:
            total, live = moved_bytes(B, count, launches, chip, [next(found) for _ in launches])
            moved.append(
                {
                    "workload": workload.name,
                    "chip": chip.name,
                    "B": B,
                    "floor_bytes": workload.floor_bytes,
                    "moved_bytes": total,
                    "ratio": total / workload.floor_bytes,
                    "requested_bytes": B * summed(count, "requested_bytes"),
                    "live_bytes": live,
                    "floor_flops": workload.floor_flops,
                    "flops": B * summed(count, "flops"),
                }
            )
    return moved


if __name__ == "__main__":
    sys.exit(main())
