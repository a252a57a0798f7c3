"""Times the fused ops against the obvious way in torch, and against the attention itself.

    python -m ficoco_vllm.benchmarks.kernels.bench [--out FOLDER] [--batches 1 8 32]

On a GPU the Triton kernels run; without one it says so and times the torch implementations, with bars: at
least as fast as the obvious way, and at most half of its peak memory at B = 8. Results are compared before
anything is timed; on a mismatch nothing is printed and the exit status is 1.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from ficoco_vllm.benchmarks.kernels.cases import Case, decoder, tower
from ficoco_vllm.benchmarks.kernels.chart import chart

MEMORY_LIMIT = 0.5
MEMORY_BATCH = 8
TIME_LIMIT = 1.0
# The obvious way rounds its logits to the inputs' type; in half precision that is what sets them apart.
ATOL = {torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 2e-1}


def verify(case: Case, dtype: torch.dtype) -> None:
    """Compare both ways.

    Raises:
        AssertionError: they differ.
    """
    for found, expected in zip(case.ours(), case.eager(), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=ATOL[dtype], atol=ATOL[dtype])


def seconds(run: Callable[[], Any], device: str, repeats: int) -> float:
    """Median time of a call."""
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, return_mode="median")) / 1e3
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def pair(case: Case, device: str, repeats: int) -> tuple[float, float]:
    """Median times of both ways, taken in turns so that a busy machine slows both alike."""
    if device == "cuda":
        return seconds(case.ours, device, repeats), seconds(case.eager, device, repeats)
    ours, eager = [], []
    for _ in range(repeats):
        ours.append(seconds(case.ours, device, 1))
        eager.append(seconds(case.eager, device, 1))
    return statistics.median(ours), statistics.median(eager)


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory that a call holds at once beyond its inputs, results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    held = most = 0
    kineto = profiler.profiler.kineto_results
    for event in sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(batches: list[int], device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Verify all, then time all."""
    backend: Literal["torch", "triton"] = "triton" if device == "cuda" else "torch"
    rows = []
    for B in batches:
        for site in (tower, decoder):
            cases = site(B, dtype, device, backend)
            for case in cases:
                verify(case, dtype)
            for case in cases:
                ours, eager = pair(case, device, repeats)
                rows.append(
                    {
                        "name": case.name,
                        "B": B,
                        "ours_seconds": ours,
                        "eager_seconds": eager,
                        "attention_seconds": case.attention and seconds(case.attention, device, repeats),
                        "ours_bytes": peak_bytes(case.ours, device),
                        "eager_bytes": peak_bytes(case.eager, device),
                    }
                )
    return rows


def show(rows: list[dict[str, Any]], bars: bool) -> bool:
    """Print the table, and the bars where they are asked for.

    Returns:
        Whether every bar holds.
    """
    print(f"{'result':34s}  B   ours ms  eager ms  ratio  attention ms  ours MB  eager MB  ratio")
    for row in rows:
        attention = row["attention_seconds"]
        print(
            f"{row['name']:34s} {row['B']:2d} {row['ours_seconds'] * 1e3:9.3f} "
            f"{row['eager_seconds'] * 1e3:9.3f} {row['ours_seconds'] / row['eager_seconds']:6.3f} "
            f"{'' if attention is None else f'{attention * 1e3:.3f}':>13s} "
            f"{row['ours_bytes'] / 1e6:8.2f} {row['eager_bytes'] / 1e6:9.2f} "
            f"{row['ours_bytes'] / row['eager_bytes']:6.3f}"
        )
    held = True
    for row in rows if bars else []:
        measured = [("time", row["ours_seconds"] / row["eager_seconds"], TIME_LIMIT)]
        if row["B"] == MEMORY_BATCH:
            measured.append(("memory", row["ours_bytes"] / row["eager_bytes"], MEMORY_LIMIT))
        for what, ratio, limit in measured:
            verdict = "PASS" if ratio <= limit else "FAIL"
            print(f"BAR {what}[{row['name']},B={row['B']}] {ratio:.4f} {limit} {verdict}")
            held &= ratio <= limit
    return held


def main() -> int:
    """Run, print, write.

    Returns:
        1 on a mismatch or if a bar fails.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/kernels"))
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu":
        print("no GPU: the torch implementations are timed; the Triton kernels are not run")
    batches = arguments.batches or ([1, 8, 32] if device == "cuda" else [1, 8])
    try:
        rows = measure(batches, device, dtype, arguments.repeats)
    except AssertionError as error:
        print(f"the two ways differ, so nothing is timed: {error}", file=sys.stderr)
        return 1
    print(f"{name}, {dtype}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads")
    held = show(rows, bars=device == "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    context = {
        "device": name,
        "dtype": str(dtype),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (arguments.out / "bench.json").write_text(json.dumps(context | {"rows": rows}, indent=1))
    (arguments.out / "bench.svg").write_text(chart(rows, f"{name}, {dtype}"))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
