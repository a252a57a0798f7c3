"""Measures which tile sizes are fastest on this GPU, and writes them where the kernels look for them.

    python -m ficoco_vllm.benchmarks.kernels.tune

Serving reads the file once; it never tunes itself. Another choice of tiles sums in another order, so the
last bits of the results may change with the file.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from ficoco_vllm.benchmarks.kernels.workloads import workloads
from ficoco_vllm.kernels import tuning

BATCHES = (1, 8, 32)


def fastest(
    runs: Iterable[Callable[[], Any]], kind: str, measure: Callable[[Callable[[], Any]], float]
) -> dict[str, int]:
    """The fastest candidate, an index into `CANDIDATES[op]`, of each class "op/default" that the calls use."""
    chosen: dict[str, int] = {}
    asked: set[str] = set()

    def get(name: str, default: int) -> int:
        asked.add(name)
        return chosen.get(name, default)

    seconds: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    with patch.object(tuning, "_measured", lambda: {kind: SimpleNamespace(get=get)}):
        for run in runs:
            asked.clear()
            run()
            for name in sorted(asked):
                for index in range(len(tuning.CANDIDATES[name.split("/")[0]])):
                    chosen[name] = index
                    seconds[name][index] += measure(run)
                del chosen[name]
    return {name: min(times, key=times.__getitem__) for name, times in seconds.items()}


def main() -> int:
    """Measure and write; returns 1 where there is no GPU."""
    if not torch.cuda.is_available():
        print("no GPU: there is nothing to tune", file=sys.stderr)
        return 1
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    def measure(run: Callable[[], Any]) -> float:
        try:
            return float(do_bench(run, return_mode="median"))
        except OutOfResources:  # tiles that this device cannot hold
            return float("inf")

    kind = torch.cuda.get_device_name()
    runs = (workload.run for B in BATCHES for workload in workloads(B, torch.float16, "cuda"))
    found = fastest(runs, kind, measure)
    path = tuning.measured_path()
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known | {kind: found}, indent=1))
    print(f"{kind}: {found}, written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
