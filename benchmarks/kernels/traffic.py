"""Loads and stores of the kernels, counted by running them in Triton's interpreter.

For each op at B = 1: the distinct 32-byte sectors that each launch touches (what must come from or go to
device memory if the second-level cache holds the rest), the bytes that the programs ask for in all (what
that cache must deliver), and the floating-point operations of the matrix products, padding of the tiles
included. Work of torch between the launches is counted by the size of its operands.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from ficoco_vllm.benchmarks.kernels.workloads import workloads

SECTOR_BYTES = 32
# Operators of torch that touch no memory.
_FREE = {"empty", "empty_like", "new_empty", "view", "transpose", "expand", "select", "slice", "detach"}


def traffic() -> dict[str, dict[str, Any]]:
    """Counts of every workload at B = 1 by its name, in a process that was started with TRITON_INTERPRET=1."""
    torch.manual_seed(0)
    return {workload.name: count(workload.run) for workload in workloads(1, torch.float16, "cpu")}


def count(run: Callable[[], Any]) -> dict[str, Any]:
    """Bytes that the launches of a call load and store, and their operations.

    Returns:
        `launches`, one mapping each in order: `moved_bytes`, distinct sectors of its loads and those of its stores;
        `requested_bytes`, all that its programs load and store; `flops` of its matrix products. `torch_bytes`: operands
        and results of torch's operators between them.
    """
    launches: list[dict[str, int]] = []
    sectors: dict[str, list[Any]] = defaultdict(list)  # of the launch that runs
    multiply, launch = InterpreterBuilder.create_dot, InterpretedFunction.run

    def counted_access(name: str, place_of_mask: int) -> Callable[..., Any]:
        access = getattr(InterpreterBuilder, name)

        def counted(self: Any, pointers: Any, *args: Any, **kwargs: Any) -> Any:
            addresses, mask = np.broadcast_arrays(pointers.data, args[place_of_mask].data)
            addresses = addresses[mask.astype(bool)]
            element_bytes = max(1, pointers.dtype.element_ty.primitive_bitwidth // 8)
            launches[-1]["requested_bytes"] += addresses.size * element_bytes
            sectors[name].append(np.unique(addresses // SECTOR_BYTES))
            return access(self, pointers, *args, **kwargs)

        return counted

    def counted_product(self: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        launches[-1]["flops"] += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return multiply(self, a, b, *args, **kwargs)

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.append({"requested_bytes": 0, "flops": 0})
        sectors.clear()
        with _disable_current_modes():
            launch(self, *args, **kwargs)
        num_sectors = sum(np.unique(np.concatenate(touched)).size for touched in sectors.values())
        launches[-1]["moved_bytes"] = num_sectors * SECTOR_BYTES

    with (
        patch.multiple(
            InterpreterBuilder,
            create_masked_load=counted_access("create_masked_load", 0),
            create_masked_store=counted_access("create_masked_store", 1),
            create_dot=counted_product,
        ),
        patch.object(InterpretedFunction, "run", counted_launch),
        TorchBytes() as between,
    ):
        run()
    return {"launches": launches, "torch_bytes": between.total}


class TorchBytes(TorchDispatchMode):
    """Bytes of the operands and results of torch's operators in a block."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1] not in _FREE:
            self.total += sum(x.nbytes for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor))
        return result
