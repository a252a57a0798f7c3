"""An engine in a process of its own that answers calls: what reduces in the decoder needs another environment."""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ficoco_vllm.compat import hook_interpreter

# Model runner V2 through Triton's interpreter, whatever the machine; read before vLLM is imported.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}


class Remote:
    """The other end of the pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(engine, *args)` there and give back what it returns.

        Raises:
            RuntimeError: with the traceback of the other side.
        """
        self.pipe.send((function, args))
        return self._receive()

    def _receive(self) -> Any:
        succeeded, value = self.pipe.recv()
        if not succeeded:
            raise RuntimeError(value)
        return value


def without_amx() -> None:
    """Let vLLM multiply by 8-bit weights as on CPUs without AMX: its product for those with it takes no float32.

    Here, as a process that is to find Triton's interpreter must not import vLLM before.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = lambda *_: False


@contextmanager
def remote_engine(
    model: Path,
    ficoco: dict[str, Any],
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Remote]:
    """Start an engine; it ends with the block. `prepare` is called in its process before."""
    changed = {**ENVIRONMENT, **(environment or {})}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, model, ficoco, prepare, options))
    process.start()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    there.close()
    remote = Remote(here)
    try:
        remote._receive()
        yield remote
    finally:
        here.close()
        process.join(60)
        if process.is_alive():
            process.terminate()
            process.join()


def _serve(
    pipe: Connection,
    model: Path,
    ficoco: dict[str, Any],
    prepare: Callable[[], None] | None,
    options: dict[str, Any],
) -> None:
    hook_interpreter()
    try:
        from tests.support.engine import make_engine

        if prepare is not None:
            prepare()
        engine = make_engine(model, ficoco, **options)
    except Exception:
        pipe.send((False, traceback.format_exc()))
        return
    pipe.send((True, None))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(engine, *args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    engine.llm_engine.engine_core.shutdown()
