"""An engine in a process of its own that answers calls: what reduces in the decoder needs another environment."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness import engine as harness
from ficoco_vllm.benchmarks.harness.engine import Remote

__all__ = ["Remote", "remote_engine", "without_amx"]

# Model runner V2 through Triton's interpreter, whatever the machine; read before vLLM is imported.
ENVIRONMENT = harness.INTERPRETER


def without_amx() -> None:
    """Let vLLM multiply by 8-bit weights as on CPUs without AMX: its product for those with it takes no float32.

    Here, as a process that is to find Triton's interpreter must not import vLLM before.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = lambda *_: False


def remote_engine(
    model: Path,
    ficoco: dict[str, Any],
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> AbstractContextManager[Remote]:
    """Start an engine; it ends with the block. `prepare` is called in its process before."""
    return harness.remote_engine(model, ficoco, {**ENVIRONMENT, **(environment or {})}, prepare, **options)
