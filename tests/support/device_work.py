"""Counts of what a computation asks of the device, on meta tensors: launches, and copies from the host.

Triton's launchers are called and recorded. Meta tensors hold no data, so whatever would wait for the device (`item`,
`nonzero`, a boolean index) fails, and all shapes are known on the host.
"""

from collections import Counter
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Entry points of the custom ops and the launchers behind them.
OPS = {
    "attention_scores.custom": {
        "softmax_stats": "attention_scores.triton_stats",
        "attention_block": "attention_scores.triton_block",
        "attention_sums": "attention_scores.triton_sums",
        "cls_scores": "attention_scores.triton_cls",
    },
    "farthest_points.ops": {"_farthest_points": "farthest_points.triton"},
    "filter_scores.ops": {"_filter_scores": "filter_scores.triton"},
    "partition.ops": {"_partition": "partition.triton"},
    "quantile_merge.ops": {"_quantile_merge": "quantile_merge.triton"},
}
# Ops that only take memory.
FREE = {"empty", "new_empty", "empty_strided", "empty_like"}


class DeviceWork(TorchDispatchMode):
    """Counts what is launched; copies from the host are counted apart."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().split("::")[1].split(".")[0]
        result = op(*args, **(kwargs or {}))
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]
        if not any(x.device.type == "meta" for x in made):
            return result
        if any(x.device.type == "cpu" for x in given):
            self.copies.append(name)
        memory = {x.untyped_storage()._cdata for x in given}
        is_view = made and all(x.untyped_storage()._cdata in memory for x in made)
        if name not in FREE and (op._schema.is_mutable or not is_view):
            self.launches[name] += 1
        return result


def record_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of the fused ops, whose launchers run in place of the custom ops."""
    from triton.runtime.jit import JITFunction

    for module, ops in OPS.items():
        for name, launcher in ops.items():
            made = getattr(import_module(f"ficoco_vllm.kernels.{launcher}"), name.removeprefix("_"))
            monkeypatch.setattr(import_module(f"ficoco_vllm.kernels.{module}"), name, made)
    launches: Counter[str] = Counter()

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        launches[self.__name__] += 1

    monkeypatch.setattr(JITFunction, "run", run)
    return launches
