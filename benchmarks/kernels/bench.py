"""Time the fused ops against plain torch code, and against the attention itself.

    python -m ficoco_vllm.benchmarks.kernels.bench [--batches 1 8 32] [--repeats 5]

On a GPU the Triton kernels run; without one the torch implementations are timed, with bars: at
least as fast as the plain code, and at most half of its peak memory at B = 8. Results are compared before
anything is timed; on a mismatch nothing is printed and the exit status is 1.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, product
from statistics import median
from timeit import timeit
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from ficoco_vllm.benchmarks.harness.results import (
    Bar,
    at_most,
    environment,
    make_parser,
    print_table,
    report,
    write,
)
from ficoco_vllm.benchmarks.kernels.cases import decoder, tower

MEMORY_LIMIT = 0.5
MEMORY_BATCH = 8
TIME_LIMIT = 1.0
# The plain code rounds its logits to the inputs' type, which dominates the difference in half precision.
ATOL = {torch.float32: 1e-4, torch.float16: 5e-2}


def main() -> int:
    """Run, print, write; returns 1 on a mismatch or if a bar fails."""
    parser = make_parser(__doc__, "kernels", seed=False)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--repeats", type=int, default=5, help="on a CPU")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16 if device == "cuda" else torch.float32
    if device == "cpu":
        print("no GPU: the torch implementations are timed; the Triton kernels are not run")
    batches = arguments.batches or ([1, 8, 32] if device == "cuda" else [1, 8])
    try:
        rows = measure(batches, device, dtype, arguments.repeats)
    except AssertionError as error:
        print(f"the two ways differ, so nothing is timed: {error}", file=sys.stderr)
        return 1
    context = {"environment": environment(), "dtype": str(dtype), "threads": torch.get_num_threads()}
    print(", ".join(f"{name}: {value}" for name, value in context.items()))
    show(rows)
    write({**context, "rows": rows}, arguments.out)
    return report(bars(rows)) if device == "cpu" else 0


def measure(batches: list[int], device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """Figures of each case and batch; at each batch a site is timed once all of its cases are verified.

    Raises:
        AssertionError: the two ways differ.
    """
    backend: Literal["torch", "triton"] = "triton" if device == "cuda" else "torch"
    rows = []
    for B, site in product(batches, (tower, decoder)):
        torch.manual_seed(B)
        cases = site(B, dtype, device, backend)
        for case in cases:
            for found, expected in zip(case.ours(), case.eager(), strict=True):
                torch.testing.assert_close(
                    found.float(), expected.float(), rtol=ATOL[dtype], atol=ATOL[dtype]
                )
        for case in cases:
            ways = [case.ours, case.eager, *([case.attention] if case.attention else [])]
            ours, eager, *attention = seconds(ways, device, repeats)
            rows.append(
                {
                    "name": case.name,
                    "B": B,
                    "ours_seconds": ours,
                    "eager_seconds": eager,
                    "attention_seconds": attention[0] if attention else None,
                    "ours_bytes": peak_bytes(case.ours, device),
                    "eager_bytes": peak_bytes(case.eager, device),
                }
            )
    return rows


def seconds(runs: Sequence[Callable[[], Any]], device: str, repeats: int) -> list[float]:
    """Median time of each call; on a CPU taken in turns, so that a busy machine slows all equally."""
    if device == "cuda":
        from triton.testing import do_bench

        return [float(do_bench(run, return_mode="median")) / 1e3 for run in runs]
    rounds = [[timeit(run, number=1) for run in runs] for _ in range(repeats)]
    return [median(times) for times in zip(*rounds, strict=True)]


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """Most memory that a call holds at once beyond its inputs, results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""

    def cells(row: dict[str, Any], figure: str, factor: float, digits: int) -> list[str]:
        ours, eager = (row[f"{who}_{figure}"] * factor for who in ("ours", "eager"))
        return [f"{ours:.{digits}f}", f"{eager:.{digits}f}", f"{ours / eager:.3f}"]

    table = []
    for row in rows:
        attention = row["attention_seconds"]
        times = [*cells(row, "seconds", 1e3, 3), "" if attention is None else f"{attention * 1e3:.3f}"]
        table.append((row["name"], row["B"], *times, *cells(row, "bytes", 1e-6, 2)))
    header = ("result", "B", "ours ms", "eager ms", "ratio", "attention ms", "ours MB", "eager MB", "ratio")
    print_table(header, table)


def bars(rows: list[dict[str, Any]]) -> Iterator[Bar]:
    """The bars: time, and memory at `MEMORY_BATCH`, relative to the plain code."""
    for row in rows:
        place = f"[{row['name']},B={row['B']}]"
        yield at_most(f"time{place}", row["ours_seconds"] / row["eager_seconds"], TIME_LIMIT)
        if row["B"] == MEMORY_BATCH:
            yield at_most(f"memory{place}", row["ours_bytes"] / row["eager_bytes"], MEMORY_LIMIT)


if __name__ == "__main__":
    sys.exit(main())
