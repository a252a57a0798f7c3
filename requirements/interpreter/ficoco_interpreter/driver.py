"""The driver part of a Triton backend without a device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends import driver
from triton.backends.compiler import GPUTarget


class InterpreterDriver(driver.DriverBase):
    """Driver of the CPU. Triton never chooses it by itself."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        """False: the environment enables the interpreter, not the presence of a device."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The CPU, the only target."""
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        """Device of the tensors of interpreted kernels."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[[Callable[[], Any], Sequence[float]], Sequence[float]]:
        """Raise NotImplementedError: the speed of interpreted kernels is meaningless."""
        raise NotImplementedError("interpreted kernels cannot be timed")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The type unchanged: nothing is launched."""
        return ty
