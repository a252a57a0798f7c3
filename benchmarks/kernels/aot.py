"""Compiles every kernel ahead of time, without a GPU, and holds what can be known so to bars.

    python -m ficoco_vllm.benchmarks.kernels.aot [--json OUT.json] [--defaults]

The launchers run on meta tensors at the shapes of LLaVA-1.5-7B; what they would compile is compiled for
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
from pathlib import Path
from typing import Any

import torch

from ficoco_vllm.benchmarks.kernels.chips import CHIPS, Chip
from ficoco_vllm.benchmarks.kernels.compiling import Compiled, Compiler, compiled, launches_of
from ficoco_vllm.benchmarks.kernels.recording import Launch
from ficoco_vllm.benchmarks.kernels.variants import variants
from ficoco_vllm.benchmarks.kernels.workloads import Workload, workloads

BATCHES = (1, 8, 32)
BYTES_LIMIT = 1.25
# Of each kernel: how many of the first axes of its grid hold programs that read the same data, and over how
# many steps of a loop they walk through it side by side (the heads of the tower, the smaller model).
SHARING = {
    "softmax_stats_kernel": (1, 1),
    "attention_sums_kernel": (1, 1),
    "attention_block_kernel": (2, 16),
    "cls_scores_kernel": (1, 1),
    "filter_scores_kernel": (1, 1),
    "partition_kernel": (1, 1),
    "row_statistics_kernel": (1, 1),
    "merge_kernel": (2, 1),
}
# While programs walk side by side through the heads, so many heads' data is live: the pipeline and its skew.
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
        axes, steps = SHARING[launch.name]
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


def bar(name: str, measured: float, limit: float, passed: bool) -> bool:
    """Print one bar."""
    print(f"BAR {name} {measured:g} {limit:g} {'PASS' if passed else 'FAIL'}")
    return passed


def distinct(made: list[Compiled]) -> list[Compiled]:
    """One of those that differ in nothing but the number of programs."""
    return list(
        {
            (c.workload, c.kernel, c.chip, c.registers, c.shared_bytes, c.loads): c for c in reversed(made)
        }.values()
    )[::-1]


def report(made: list[Compiled], moved: list[dict[str, Any]], amd_spills: dict[str, int]) -> bool:
    """Print tables and bars.

    Returns:
        Whether every bar holds.
    """
    print("\nCompiled (programs, resident ones, occupancy and waves are predicted)")
    print(
        f"{'op':38s} {'kernel':24s} {'chip':7s} "
        "regs shared spill tensor wide/loads programs resident  occ waves"
    )
    for c in made:
        print(
            f"{c.workload:38s} {c.kernel:24s} {c.chip:7s} {c.registers:4d} {c.shared_bytes:6d} {c.spills:5d} "
            f"{c.tensor_core:6d} {c.wide_loads:4d}/{c.loads:<5d} {c.num_programs:8d} {c.num_resident:8d} "
            f"{c.occupancy:4.0%} {c.waves:5.2f}"
        )
    print("\nBytes and operations (counted in the interpreter at B = 1; live: needed in the L2 cache)")
    print(
        f"{'op':38s} {'chip':7s}  B  floor MB  moved MB ratio requested MB live MB  GFLOP floor  GFLOP done"
    )
    for m in moved:
        print(
            f"{m['workload']:38s} {m['chip']:7s} {m['B']:2d} {m['floor_bytes'] / 1e6:9.3f} "
            f"{m['moved_bytes'] / 1e6:9.3f} {m['ratio']:5.3f} {m['requested_bytes'] / 1e6:12.3f} "
            f"{m['live_bytes'] / 1e6:7.2f} {m['floor_flops'] / 1e9:12.3f} {m['flops'] / 1e9:11.3f}"
        )
    print()
    held = [bar(f"spills[{c.workload},{c.kernel},{c.chip}]", c.spills, 0, c.spills == 0) for c in made]
    held += [bar(f"spills[{name},gfx942]", count, 0, count == 0) for name, count in amd_spills.items()]
    held += [
        bar(f"fits[{c.workload},{c.kernel},{c.chip}]", c.num_resident, 1, c.num_resident >= 1) for c in made
    ]
    for m in moved:
        name = f"bytes[{m['workload']},{m['chip']},B={m['B']}]"
        held.append(bar(name, round(m["ratio"], 4), BYTES_LIMIT, m["ratio"] <= BYTES_LIMIT))
    for c in made:
        if "/" not in c.workload:  # a variant, whose rows need not be aligned
            continue
        if c.kernel in PRODUCT_KERNELS:
            held.append(
                bar(f"tensor_core[{c.workload},{c.kernel},{c.chip}]", c.tensor_core, 1, c.tensor_core >= 1)
            )
        if c.kernel in PRODUCT_KERNELS or c.kernel == "cls_scores_kernel":
            held.append(
                bar(f"wide_loads[{c.workload},{c.kernel},{c.chip}]", c.wide_loads, 1, c.wide_loads >= 1)
            )
    print(f"{sum(held)} of {len(held)} bars hold")
    return all(held)


def main() -> int:
    """Compile, count, print the tables and the bars.

    Returns:
        1 if a bar fails.
    """
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
    passed = report(made, moved, amd_spills)
    print(f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        figures = {"compiled": [asdict(one) for one in made], "moved": moved, "amd_spills": amd_spills}
        arguments.json.write_text(json.dumps(figures, indent=1))
    return 0 if passed else 1


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
