"""The compiler part of a Triton backend, which the interpreter never uses."""

from types import ModuleType
from typing import Any

# Triton requires exactly one concrete subclass in this module's namespace, so the base is not imported by name.
from triton.backends import compiler


class InterpreterBackend(compiler.BaseBackend):
    """Backend without a compiler: compiling a kernel raises NotImplementedError."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether a target is this machine's CPU."""
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        """Name of the backend in Triton's cache."""
        return "interpreter"

    def parse_options(self, options: dict[str, Any]) -> Any:
        """Raise NotImplementedError: only a compiler has options."""
        raise NotImplementedError("the backend `cpu` only interprets: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any = None) -> None:
        """Raise NotImplementedError: only a compiler has stages."""
        raise NotImplementedError("the backend `cpu` only interprets: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """Do nothing."""

    def get_module_map(self) -> dict[str, ModuleType]:
        """Return no device libraries."""
        return {}
