"""Record what Triton would compile for a launch, without a GPU: the launchers run on meta tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.float64: "fp64",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, specialised as Triton's launcher does it.

    Attributes:
        constants: what is fixed at compile time.
        divisible: positions of arguments that are multiples of 16.
    """

    function: Any
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[int, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """The kernel's name."""
        return str(self.function.__name__)

    @property
    def specialisation(self) -> tuple[Any, ...]:
        """Everything that the compiler depends on: launches that agree in it are one kernel."""
        constants = sorted((name, repr(value)) for name, value in self.constants.items())
        options = sorted(self.options.items())
        return (
            self.name,
            tuple(sorted(self.signature.items())),
            tuple(constants),
            self.divisible,
            tuple(options),
        )

    def __getstate__(self) -> dict[str, Any]:
        """For another process: the kernel by the place where it is defined."""
        place = (self.function.fn.__module__, self.name)
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"function": place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The other side of `__getstate__`."""
        module, name = state["function"]
        for field, value in (state | {"function": getattr(import_module(module), name)}).items():
            object.__setattr__(self, field, value)

    @property
    def num_programs(self) -> int:
        """Size of the grid."""
        return int(torch.Size(self.grid).numel())

    def source(self, hip: bool) -> ASTSource:
        """Input of the compiler. ROCm has no TF32 emulation, so the launchers request none there."""
        constants = {
            name: "ieee" if hip and value == "tf32x3" else value for name, value in self.constants.items()
        }
        attributes = {(index,): [["tt.divisibility", 16]] for index in self.divisible}
        return ASTSource(self.function, self.signature, constants, attributes)


def _launch(function: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    options = {name: kwargs.pop(name) for name in _OPTIONS if name in kwargs}
    values = dict(zip(function.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = {}, {}, []
    for index, parameter in enumerate(function.params):
        value = values[parameter.name]
        # The launcher makes a constant of None, and of 1 unless the parameter forbids it.
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + _NAMES[value.dtype]
            # Torch's allocations are aligned; a view is so by its offset.
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name], aligned = "fp32", False
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameter.do_not_specialize
        if aligned:
            divisible.append(index)
    size = tuple(grid) if isinstance(grid, tuple) else (grid,)
    return Launch(function, size, signature, constants, tuple(divisible), options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collects the launches made inside, and runs none of them."""
    launches: list[Launch] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_launch(self, args, grid, kwargs))

    with patch.object(JITFunction, "run", run):
        yield launches
