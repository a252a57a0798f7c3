"""The driver half of a Triton backend: there is no device to drive."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.backends import driver
from triton.backends.compiler import GPUTarget


class InterpreterDriver(driver.DriverBase):
    """Says that kernels run on the CPU, and that Triton must never choose this by itself."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        """False: kernels are interpreted because the environment says so, not because a device was found."""
        return False

    def get_current_target(self) -> GPUTarget:
        """The CPU, the only target there is."""
        return GPUTarget("cpu", 0, 0)

    def get_active_torch_device(self) -> torch.device:
        """Where tensors of interpreted kernels live."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[[Callable[[], Any], Sequence[float]], Sequence[float]]:
        """Not to be had: interpreted kernels say nothing about speed."""
        raise NotImplementedError("interpreted kernels cannot be timed")

    def map_python_to_cpp_type(self, ty: str) -> str:
        """The type as it is: nothing is launched."""
        return ty
