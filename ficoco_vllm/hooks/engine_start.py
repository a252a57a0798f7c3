"""Interrupts of a server that waits for its engine, which vLLM drops."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

from ficoco_vllm.hooks.wrapping import wrap


def hook_engine_start(forwards_signals: bool) -> None:
    """Make vLLM pass on an interrupt where it waits for its engine. Idempotent.

    Args:
        forwards_signals: whether this process sends the signals that it gets to its children.
    """
    from vllm.v1.engine import utils

    wrap(utils, "zmq_socket_ctx", _pass_on)
    if not forwards_signals:
        wrap(BaseProcess, "start", _start_without_interrupts)


@contextmanager
def _pass_on(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[Any]:
    """The socket through which the engine says that it is ready; vLLM's version drops an interrupt."""
    interrupt = None
    with original(*args, **kwargs) as socket:
        try:
            yield socket
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _start_without_interrupts(original: Callable[..., None], process: BaseProcess) -> None:
    """Start a child that never sees SIGINT, which a terminal sends to all processes; its parent ends it.

    A child inherits which signals are blocked. One that is importing vLLM would print a traceback.
    """
    resource_tracker.ensure_running()  # starts with the first child otherwise, and unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        original(process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
