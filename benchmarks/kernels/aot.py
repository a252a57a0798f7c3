"""Compile every kernel ahead of time, without a GPU, and check registers, spills, memory and traffic against bars.

    python -m ficoco_vllm.benchmarks.kernels.aot [--defaults]

The launchers run on meta tensors at the shapes of LLaVA-1.5-7B; the kernels that they would launch are compiled for
three NVIDIA generations and for AMD's gfx942, and so are other types and awkward shapes; with
`--defaults` only what LLaVA-1.5-7B launches in fp16, for NVIDIA. Each bar is a line
`BAR name measured limit PASS|FAIL`; the exit status is 1 if one fails.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, print_table, report
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
        wanted = [
            (workload.name, launch, chip)
            for (_, workload, launches), chip in product(launched, CHIPS)
            for launch in launches
        ]
        made = compile_all(wanted if arguments.defaults else [*wanted, *others(launched)])
        bars = [*code_bars(made), *byte_bars(launched, counts.result(), made)]
    status = report(bars)
    print(f"{sum(bar.passed for bar in bars)} of {len(bars)} bars hold")
    print(f"{time.perf_counter() - start:.0f} s")
    return status


def others(launched: list[tuple[int, Workload, list[Launch]]]) -> Iterator[tuple[str, Launch, Chip]]:
    """AMD's chip, other types at the same shapes, and every optional argument at awkward ones."""
    for _, workload, launches in launched:
        yield from ((workload.name, launch, AMD) for launch in launches)
    for dtype in (torch.bfloat16, torch.float32):
        for workload in workloads(1, dtype):
            label = f"{workload.name} {str(dtype).removeprefix('torch.')}"
            # The chip with the least shared memory, and the one whose instructions differ most from it.
            yield from ((label, *both) for both in product(launches_of(workload.run), CHIPS[:2]))
    for name, run in variants().items():
        yield from ((name, launch, CHIPS[0]) for launch in launches_of(run))


def code_bars(made: list[Compiled]) -> Iterator[Bar]:
    """Print what the compiler made of each kernel, and limit it."""
    kinds: dict[Any, Compiled] = {}  # the first of those that differ in the number of programs only
    for c in made:
        kinds.setdefault((c.workload, c.launch.name, c.chip, c.code), c)
    print("\nCompiled (resident: programs that fit on one processor, predicted)")
    print_table(
        ["op", "kernel", "chip", "regs", "shared", "spill", "tensor", "wide/loads", "programs", "resident"],
        [
            (
                *(c.workload, c.launch.name, c.chip.name, c.code.registers, c.code.shared_bytes),
                *(c.code.spills, c.code.tensor_core, f"{c.code.wide_loads}/{c.code.loads}"),
                *(c.launch.num_programs, c.num_resident),
            )
            for c in kinds.values()
            if c.chip != AMD
        ],
    )
    for c in kinds.values():
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


def byte_bars(
    launched: list[tuple[int, Workload, list[Launch]]],
    counts: dict[str, dict[str, Any]],
    made: list[Compiled],
) -> Iterator[Bar]:
    """Print bytes and operations of each workload at each batch on each chip, and limit the bytes by the floor.

    Args:
        launched: batch, workload and its launches.
        counts: counts of the interpreter at B = 1.
        made: code of these launches first, in order, chip by chip.
    """
    rows = []
    found = iter(made)
    for (B, workload, launches), chip in product(launched, CHIPS):
        count = counts[workload.name]
        moved, live = moved_bytes(B, count, [next(found) for _ in launches])
        requested, flops = (
            B * sum(one[figure] for one in count["launches"]) for figure in ("requested_bytes", "flops")
        )
        ratio = moved / workload.floor_bytes
        megabytes = (f"{n / 1e6:.3f}" for n in (workload.floor_bytes, moved, requested, live))
        gigaflops = (f"{n / 1e9:.3f}" for n in (workload.floor_flops, flops))
        rows.append((workload.name, chip.name, B, *megabytes, f"{ratio:.3f}", *gigaflops))
        yield at_most(f"bytes[{workload.name},{chip.name},B={B}]", ratio, BYTES_LIMIT)
    print("\nBytes and operations (counted in the interpreter at B = 1; live: needed in the L2 cache)")
    sizes = ("floor MB", "moved MB", "requested MB", "live MB")
    print_table(("op", "chip", "B", *sizes, "ratio", "GFLOP floor", "GFLOP done"), rows)
    print()


def moved_bytes(B: int, counts: dict[str, Any], made: list[Compiled]) -> tuple[int, int]:
    """Bytes from and to device memory, and the most data that must stay in the second-level cache for that.

    Items share nothing, so the counts of one item hold for each. Programs that share data run together: if
    what they share fits into the cache, it is read once; if not, every request goes to memory.
    """
    total, most = B * counts["torch_bytes"], 0
    for one, count in zip(made, counts["launches"], strict=True):
        axes, steps = SHARING.get(one.launch.name, (1, 1))
        together = math.prod(one.launch.grid[:axes])
        groups = one.launch.num_programs // together
        in_flight = min(groups, -(-one.num_resident * one.chip.num_processors // together))
        walked = min(1.0, LIVE_STEPS / steps)
        live = int(in_flight * count["moved_bytes"] * B / groups * walked)
        total += B * count["moved_bytes" if live <= one.chip.cache_bytes else "requested_bytes"]
        most = max(most, live)
    return total, most


if __name__ == "__main__":
    sys.exit(main())
