"""SIGINT and SIGTERM while a server starts, which takes minutes: it stops immediately."""

import signal
from typing import Any


def stop_at_once() -> None:
    """Let both signals raise KeyboardInterrupt, until vLLM handles them.

    asyncio replaces Python's own handler of SIGINT by one that waits for the engine first, and leaves others alone. A
    signal that the parent process ignores, as a shell does for jobs in the background, stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: Any) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)  # a second one would end this process before its children
    raise KeyboardInterrupt
