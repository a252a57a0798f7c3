"""A server that is told to stop: what it has accepted is answered, what comes then is turned away with 503."""

import asyncio
import time
from collections.abc import Callable
from functools import wraps
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from ficoco_vllm.server.openai_errors import error_answer

# On the state of an application.
STATE = "ficoco_drain"
# Of the header `Retry-After`, seconds: whoever started this server starts another, or there is one beside it.
RETRY_SECONDS = 5
_LOOK_SECONDS = 0.05


class Drain:
    """Counts the requests of one application.

    Attributes:
        num_open: requests that are being answered.
        draining: whether no more are accepted.
    """

    def __init__(self) -> None:
        self.num_open = 0
        self.draining = False

    def wait(self, timeout_seconds: float) -> float:
        """Accept nothing more and wait for what is open; not from the thread that answers.

        Returns:
            Seconds of the time that are left.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_seconds
        while self.num_open and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return max(0.0, deadline - time.monotonic())

    def before_shutdown(self, engine_client: Any) -> None:
        """Let an engine's client wait for open requests before it is shut down by a signal.

        vLLM lets the engine finish what runs, but first ends the threads that read prompts, so that requests which it
        has accepted and not yet handed to the engine would get 500.

        Args:
            engine_client: vLLM's `AsyncLLM`.
        """
        shutdown: Callable[..., Any] = engine_client.shutdown

        @wraps(shutdown)
        def waited(timeout: float | None = None) -> Any:
            if timeout and not engine_client.errored and not _in_event_loop():
                timeout = self.wait(timeout)
            self.draining = True
            return shutdown(timeout=timeout)

        engine_client.shutdown = waited


def _in_event_loop() -> bool:
    """Whether this thread answers requests: a signal's shutdown runs in another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class DrainGate:
    """ASGI middleware: counts requests, and turns those away that come too late."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        """Wrap an application.

        Args:
            app: of vLLM.
            drain: of this application.
        """
        self.app = app
        self.drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; whoever only looks, as at `/metrics`, may go on, but must not find it healthy."""
        if scope["type"] != "http" or (scope["method"] != "POST" and scope["path"] != "/health"):
            await self.app(scope, receive, send)
            return
        if self.drain.draining:
            message = "the server is shutting down and accepts no more requests"
            headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
            status = HTTPStatus.SERVICE_UNAVAILABLE
            await error_answer(message, status, headers=headers)(scope, receive, send)
            return
        self.drain.num_open += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.drain.num_open -= 1
