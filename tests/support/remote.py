"""Engines in another process, since reducing in the decoder needs another environment."""

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
    """An engine in another process.

    Attributes:
        pipe: to the process.
        kind: of the engine, as the process knows it.
    """

    def __init__(self, pipe: Connection, *kind: Any) -> None:
        self.pipe, self.kind = pipe, kind

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run `function(engine, *args)` there and return its result.

        Raises:
            RuntimeError: with the traceback of the other side.
        """
        self.pipe.send((self.kind, function, args))
        succeeded, value = self.pipe.recv()
        if not succeeded:
            raise RuntimeError(value)
        return value


class Host:
    """A process that holds one engine of each kind, so that vLLM is imported once for all of them."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def get(self, model: Path, ficoco: dict[str, Any], **options: Any) -> Remote:
        """The engine of this kind, started at the first call; arguments as of `make_engine`."""
        remote = Remote(self.pipe, model, ficoco, options)
        remote.call(_nothing)
        return remote


def without_amx() -> None:
    """Let vLLM multiply by 8-bit weights as on CPUs without AMX: its product for those with it takes no float32.

    Here, as a process that is to find Triton's interpreter must not import vLLM before.
    """
    from vllm.model_executor.kernels.linear.scaled_mm import cpu

    cpu.check_cpu_sgl_kernel = lambda *_: False


@contextmanager
def run_host(
    environment: dict[str, str] | None = None, prepare: Callable[[], None] | None = None
) -> Iterator[Host]:
    """Run a process for engines; it ends with the block.

    Args:
        environment: variables beside those of this process.
        prepare: called there first.
    """
    changed = {**ENVIRONMENT, **(environment or {})}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, prepare))
    process.start()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    there.close()
    try:
        yield Host(here)
    finally:
        here.close()
        process.join(60)
        if process.is_alive():
            process.terminate()
            process.join()


@contextmanager
def remote_engine(
    model: Path,
    ficoco: dict[str, Any],
    environment: dict[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    **options: Any,
) -> Iterator[Remote]:
    """Start an engine in a process of its own; arguments as of `run_host` and `make_engine`."""
    with run_host(environment, prepare) as host:
        yield host.get(model, ficoco, **options)


def _nothing(_: Any) -> None:
    """Called to start an engine."""


def _serve(pipe: Connection, prepare: Callable[[], None] | None) -> None:
    hook_interpreter()
    from tests.support.engine import Engines

    if prepare is not None:
        prepare()
    with Engines() as engines:
        while True:
            try:
                (model, ficoco, options), function, args = pipe.recv()
            except EOFError:
                break
            try:
                pipe.send((True, function(engines.get(model, ficoco, **options), *args)))
            except Exception:
                pipe.send((False, traceback.format_exc()))
