"""Count the loads and stores of the kernels by running them in Triton's interpreter.

    TRITON_INTERPRET=1 python -m ficoco_vllm.benchmarks.kernels.traffic OUT.json

For each op at B = 1: the distinct 32-byte sectors that each launch touches (what must come from or go to
device memory if the second-level cache holds the rest), the bytes that the programs ask for in all (what
that cache must deliver), and the floating-point operations of the matrix products, padding of the tiles
included. Work of torch between the launches is counted by the size of its operands.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from ficoco_vllm.benchmarks.kernels.workloads import workloads

SECTOR_BYTES = 32
# Operators of torch that touch no memory.
_FREE = {"empty", "empty_like", "new_empty", "view", "transpose", "expand", "select", "slice", "detach"}


class Traffic(TorchDispatchMode):
    """What the launches made inside load, store and multiply.

    Attributes:
        launches: of each launch, in order: the distinct sectors of its loads and of its stores in bytes, all
            that its programs load and store, and the operations of its matrix products.
        torch_bytes: operands and results of torch's operators between them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[dict[str, int]] = []
        self.torch_bytes = 0
        self.requested_bytes = self.flops = 0
        self._loads: list[Any] = []
        self._stores: list[Any] = []

    def touch(self, pointers: Any, mask: Any, store: bool) -> None:
        """Record one load or store."""
        element = max(1, pointers.dtype.element_ty.primitive_bitwidth // 8)
        addresses = np.broadcast_to(pointers.data, np.broadcast(pointers.data, mask.data).shape)[
            mask.data.astype(bool)
        ]
        self.requested_bytes += int(addresses.size) * element
        (self._stores if store else self._loads).append(np.unique(addresses // SECTOR_BYTES))

    def close_launch(self) -> None:
        """A launch has ended: what it touched again came from a cache."""
        moved = 0
        for sectors in (self._loads, self._stores):
            if sectors:
                moved += np.unique(np.concatenate(sectors)).size * SECTOR_BYTES
            sectors.clear()
        self.launches.append(
            {"moved_bytes": moved, "requested_bytes": self.requested_bytes, "flops": self.flops}
        )
        self.requested_bytes = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in _FREE:
            for value in tree_leaves((args, result)):
                if isinstance(value, torch.Tensor):
                    self.torch_bytes += value.numel() * value.element_size()
        return result


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts the launches made inside."""
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    dot, run = InterpreterBuilder.create_dot, InterpretedFunction.run

    def masked_load(self: Any, pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.touch(pointers, mask, store=False)
        return load(self, pointers, mask, *args, **kwargs)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.touch(pointers, mask, store=True)
        return store(self, pointers, value, mask, *args, **kwargs)

    def product(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *args, **kwargs)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            run(self, *args, **kwargs)
        traffic.close_launch()

    with (
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        patch.object(InterpreterBuilder, "create_dot", product),
        patch.object(InterpretedFunction, "run", launch),
        traffic,
    ):
        yield traffic


def main() -> int:
    """Write the counts of every workload."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        print("set TRITON_INTERPRET=1", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    counts = {}
    for workload in workloads(1, torch.float16, "cpu"):
        with counted() as traffic:
            workload.run()
        counts[workload.name] = {"launches": traffic.launches, "torch_bytes": traffic.torch_bytes}
    Path(sys.argv[1]).write_text(json.dumps(counts, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
