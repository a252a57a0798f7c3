"""CUDA graphs without a GPU: the calls of a capture are noted, and done again at each replay.

A replay runs the same operators on the same tensors and writes results to where the capture has written them, as a
graph does. What Python decides, or reads from a tensor, at the time of capture stays as it was: a value that should
follow the data shows as a wrong result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ficoco_vllm.kernels.quantile_merge import eager

# Operators that synchronise with the device, which fails during a capture on a GPU, as does `index` with a mask.
WAITS = {
    f"aten::{name}" for name in ("item", "is_nonzero", "_local_scalar_dense", "nonzero", "masked_select")
}
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Graph:
    """Stand-in for `torch.cuda.CUDAGraph`.

    Attributes:
        replays: of all graphs, since they were installed.
    """

    replays = 0

    def __init__(self, *_: object) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Do what was captured again."""
        Graph.replays += 1
        for call in self.calls:
            call()

    def reset(self) -> None:
        """Forget what was captured."""
        self.calls.clear()

    def pool(self) -> object:
        """Handle of the memory pool, which a CPU has not."""
        return (0, 0)


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace == "vllm":  # written in Python, which does not run again
            with self:
                return op.redispatch(_CPU, *args, **kwargs)
        masked = op._schema.name == "aten::index" and any(x.dtype == torch.bool for x in _tensors(args[1:]))
        if masked or op._schema.name in WAITS:
            raise RuntimeError(f"{op.name()} is not permitted when stream is capturing")
        with _paused(self):
            result = op(*args, **kwargs)
        given = {one.untyped_storage().data_ptr() for one in _tensors((args, kwargs))}
        made = [one for one in _tensors(result) if one.untyped_storage().data_ptr() not in given]

        def again() -> None:
            places = _tensors(result)
            for new, old in zip(_tensors(op(*args, **kwargs)), places, strict=True):
                if any(old is one for one in made) and "empty" not in op.name():
                    old.copy_(new)

        self.calls.append(again)
        return result


@contextmanager
def _paused(recorder: _Recorder) -> Iterator[None]:
    """What an operator calls inside is not recorded again."""
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _capture(graph: Graph, *_: object, **__: object) -> Iterator[None]:
    with _Recorder(graph.calls):
        yield


def install(replace: Callable[[Any, str, Any], None]) -> None:
    """Put these in place of torch's, by `setattr` or for a test."""
    replace(torch.cuda, "CUDAGraph", Graph)
    replace(torch.cuda, "graph", _capture)
    replace(Graph, "replays", 0)
    # On a GPU, values cannot be read without a wait.
    replace(eager, "readable", lambda tensor: False)
