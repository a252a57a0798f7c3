"""Compile every kernel ahead of time, without a GPU, and check registers, spills, memory and traffic against bars.

    python -m ficoco_vllm.benchmarks.kernels.aot [--defaults]

The launchers run on meta tensors at the shapes of LLaVA-1.5-7B; the kernels that they would launch are compiled for
three NVIDIA generations and for AMD's gfx942, and so are other types and awkward shapes; with
`--defaults` only what LLaVA-1.5-7B launches in fp16, for NVIDIA. Each bar is a line
`BAR name measured limit PASS|FAIL`; the exit status is 1 if one fails.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, print_table
from ficoco_vllm.benchmarks.harness.results import report as report_bars
from ficoco_vllm.benchmarks.kernels.compiling import AMD, CHIPS, Chip, Compiled, compile_all
from ficoco_vllm.benchmarks.kernels.recording import Launch, launches_of
from ficoco_vllm.benchmarks.kernels.traffic import traffic
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


def main() -> int:
    """Compile, count, print the tables and the bars; returns 1 if a bar fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--defaults", action="store_true", help="only LLaVA-1.5-7B in fp16 on NVIDIA")
    arguments = parser.parse_args()
    start = time.perf_counter()
    # Triton decides at import whether it interprets: another process counts the traffic in the interpreter.
    with ProcessPoolExecutor(1, get_context("spawn")) as interpreter:
        with patch.dict(os.environ, TRITON_INTERPRET="1"):
            counts = interpreter.submit(traffic)
        launched = [(B, workload, launches_of(workload.run)) for B in BATCHES for workload in workloads(B)]
        chips = CHIPS if arguments.defaults else (*CHIPS, AMD)
        wanted = [
            (workload.name, launch, chip)
            for _, workload, launches in launched
            for chip in chips
            for launch in launches
        ]
        made = compile_all(wanted if arguments.defaults else [*wanted, *others()])
        moved = movement(launched, counts.result(), [one for one in made if one.chip != AMD])
    status = report(distinct(made), moved)
    print(f"{time.perf_counter() - start:.0f} s")
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
        counts: counts of the interpreter at B = 1.
        made: code of these launches first, in order, chip by chip.
    """
    moved = []
    found = iter(made)
    for B, workload, launches in launched:
        count = counts[workload.name]
        for chip in CHIPS:
            total, live = moved_bytes(B, count, [next(found) for _ in launches])
            moved.append(
                {
                    "workload": workload.name,
                    "chip": chip.name,
                    "B": B,
                    "floor_bytes": workload.floor_bytes,
                    "moved_bytes": total,
                    "requested_bytes": B * sum(one["requested_bytes"] for one in count["launches"]),
                    "live_bytes": live,
                    "ratio": total / workload.floor_bytes,
                    "floor_flops": workload.floor_flops,
                    "flops": B * sum(one["flops"] for one in count["launches"]),
                }
            )
    return moved


def moved_bytes(B: int, counts: dict[str, Any], made: list[Compiled]) -> tuple[int, int]:
    """Bytes from and to device memory, and the most data that must stay in the second-level cache for that.

    Items share nothing, so the counts of one item hold for each. Programs that share data run together: if
    what they share fits into the cache, it is read once; if not, every request goes to memory.
    """
    total, most = B * counts["torch_bytes"], 0
    for one, count in zip(made, counts["launches"], strict=True):
        axes, steps = SHARING.get(one.launch.name, (1, 1))
        together = int(torch.Size(one.launch.grid[:axes]).numel())
        groups = one.launch.num_programs // together
        in_flight = min(groups, -(-one.num_resident * one.chip.num_processors // together))
        walked = min(1.0, LIVE_STEPS / steps)
        live = int(in_flight * count["moved_bytes"] * B / groups * walked)
        total += B * count["moved_bytes" if live <= one.chip.cache_bytes else "requested_bytes"]
        most = max(most, live)
    return total, most


def distinct(made: list[Compiled]) -> list[Compiled]:
    """The first of those that differ in the number of programs only."""
    first: dict[Any, Compiled] = {}
    for one in made:
        first.setdefault((one.workload, one.launch.name, one.chip, one.code), one)
    return list(first.values())


def report(made: list[Compiled], moved: list[dict[str, Any]]) -> int:
    """Print tables and bars; returns the exit status, 1 if a bar fails."""
    print("\nCompiled (resident: programs that fit on one processor, predicted)")
    print_table(
        [
            *("op", "kernel", "chip", "regs", "shared", "spill", "tensor", "wide/loads"),
            *("programs", "resident"),
        ],
        [
            (
                *(c.workload, c.launch.name, c.chip.name, c.code.registers, c.code.shared_bytes),
                *(c.code.spills, c.code.tensor_core, f"{c.code.wide_loads}/{c.code.loads}"),
                *(c.launch.num_programs, c.num_resident),
            )
            for c in made
            if c.chip != AMD
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
    bars = list(_bars(made, moved))
    status = report_bars(bars)
    print(f"{sum(bar.passed for bar in bars)} of {len(bars)} bars hold")
    return status


def _bars(made: list[Compiled], moved: list[dict[str, Any]]) -> Iterator[Bar]:
    for c in made:
        place = f"[{c.workload},{c.launch.name},{c.chip.name}]"
        yield at_most(f"spills{place}", c.code.spills)
        if c.chip == AMD:
            continue
        yield Bar(f"fits{place}", c.num_resident, 1)
        if "/" not in c.workload:  # a variant, whose rows need not be aligned
            continue
        if c.launch.name in PRODUCT_KERNELS:
            yield Bar(f"tensor_core{place}", c.code.tensor_core, 1)
        if c.launch.name in (*PRODUCT_KERNELS, "cls_scores_kernel"):
            yield Bar(f"wide_loads{place}", c.code.wide_loads, 1)
    for m in moved:
        yield at_most(f"bytes[{m['workload']},{m['chip']},B={m['B']}]", m["ratio"], BYTES_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
