"""Loads and stores of the kernels, counted by running them in Triton's interpreter.

For each op at B = 1: the distinct 32-byte sectors that each launch touches (what must come from or go to
device memory if the second-level cache holds the rest), the bytes that the programs ask for in all (what
that cache must deliver), and the floating-point operations of the matrix products, padding of the tiles
included. Work of torch between the launches is counted by the size of its operands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
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
        self.begin()

    def begin(self) -> None:
        """Begin a launch; repeated accesses to a sector count once within it."""
        self.requested_bytes = self.flops = 0
        # Sectors of its loads and of its stores.
        self._sectors: dict[str, list[Any]] = {"load": [], "store": []}

    def touch(self, pointers: Any, mask: Any, way: str) -> None:
        """Record one load or store."""
        element = max(1, pointers.dtype.element_ty.primitive_bitwidth // 8)
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        addresses = np.broadcast_to(pointers.data, shape)[mask.data.astype(bool)]
        self.requested_bytes += int(addresses.size) * element
        self._sectors[way].append(np.unique(addresses // SECTOR_BYTES))

    def end(self) -> None:
        """End the launch and add its sectors."""
        num_sectors = sum(np.unique(np.concatenate(found)).size for found in self._sectors.values() if found)
        figures = {"requested_bytes": self.requested_bytes, "flops": self.flops}
        self.launches.append({"moved_bytes": num_sectors * SECTOR_BYTES, **figures})

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
        traffic.touch(pointers, mask, "load")
        return load(self, pointers, mask, *args, **kwargs)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.touch(pointers, mask, "store")
        return store(self, pointers, value, mask, *args, **kwargs)

    def product(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.flops += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return dot(self, a, b, *args, **kwargs)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        traffic.begin()
        with torch.utils._python_dispatch._disable_current_modes():
            run(self, *args, **kwargs)
        traffic.end()

    with (
        patch.object(InterpreterBuilder, "create_masked_load", masked_load),
        patch.object(InterpreterBuilder, "create_masked_store", masked_store),
        patch.object(InterpreterBuilder, "create_dot", product),
        patch.object(InterpretedFunction, "run", launch),
        traffic,
    ):
        yield traffic


def traffic() -> dict[str, dict[str, Any]]:
    """Counts of every workload at B = 1 by its name, in a process that was started with TRITON_INTERPRET=1."""
    torch.manual_seed(0)
    counts = {}
    for workload in workloads(1, torch.float16, "cpu"):
        with counted() as found:
            workload.run()
        counts[workload.name] = {"launches": found.launches, "torch_bytes": found.torch_bytes}
    return counts
