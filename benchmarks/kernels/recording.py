"""Launches that Triton would make, recorded without a GPU: the launchers run on meta tensors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel, specialised by Triton; the kernel goes to another process by its place.

    Attributes:
        constants: what is fixed at compile time, by position.
        attributes: what else the compiler knows of arguments, by position: multiples of 16.
        options: options of the compiler, as the launcher sets them.
    """

    module: str
    name: str
    grid: tuple[int, ...]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[Any]]
    options: dict[str, int]

    @property
    def specialisation(self) -> str:
        """Everything that the compiler depends on: launches that agree in it are one kernel."""
        return repr(replace(self, grid=()))

    @property
    def num_programs(self) -> int:
        """Size of the grid."""
        return math.prod(self.grid)

    def source(self, hip: bool) -> ASTSource:
        """Input of the compiler. ROCm has no TF32 emulation, so the launchers request none there."""
        constants = {
            place: "ieee" if hip and value == "tf32x3" else value for place, value in self.constants.items()
        }
        function = getattr(import_module(self.module), self.name)
        return ASTSource(function, self.signature, constants, self.attributes)


def launches_of(run: Callable[[], Any]) -> list[Launch]:
    """Launches that a call would make; none of them runs."""
    launches: list[Launch] = []
    # Specialisation is the same for all NVIDIA devices.
    backend = make_backend(GPUTarget("cuda", 80, 32))

    def record(self: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, signature, constants, attributes = self._pack_args(backend, kwargs, *bind(*args, **kwargs))
        place = self.fn.__module__, self.__name__
        launches.append(Launch(*place, grid, signature, constants, attributes, options))

    with patch.object(JITFunction, "run", record):
        run()
    return launches
