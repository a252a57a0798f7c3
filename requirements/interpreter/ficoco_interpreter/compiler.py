"""The compiler half of a Triton backend; the interpreter never asks for it."""

from types import ModuleType
from typing import Any

# Triton wants exactly one concrete subclass in this module, so the base stays behind its own module's name.
from triton.backends import compiler


class InterpreterBackend(compiler.BaseBackend):
    """Kernels are interpreted; whoever wants one compiled is told so."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether a target is this machine's CPU."""
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Name of the backend in Triton's cache."""
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> Any:
        """Not to be had: only a compiler has options."""
        raise NotImplementedError("the backend `cpu` only interprets: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any = None) -> None:
        """Not to be had: only a compiler has stages."""
        raise NotImplementedError("the backend `cpu` only interprets: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """Nothing to load."""

    def get_module_map(self) -> dict[str, ModuleType]:
        """No device libraries."""
        return {}
