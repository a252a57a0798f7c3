"""Graceful shutdown: accepted requests are answered, new ones get 503, and a dead engine is an error for the caller."""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.hooks.api_server import hook_shutdown
from ficoco_vllm.server.openai_errors import error_response

# Value of the header `Retry-After`: time for a supervisor to start the next server.
RETRY_SECONDS = 5
# Time after the engine's end in which answers that it has given reach their clients.
FLUSH_SECONDS = 1.0
_POLL_SECONDS = 0.05
LEFT = "the server has shut down before it answered this request"


class Shutdown:
    """Shutdown state of one API server.

    Attributes:
        open_tasks: tasks that answer a request each.
        draining: whether new requests are refused.
        ended: whether the engine's client is shut down, so that no more requests are answered.
        engine_died: whether the engine was dead before its client was shut down; None until then.
    """

    def __init__(self) -> None:
        self.open_tasks: set[asyncio.Task[Any]] = set()
        self.draining = False
        self.ended = False
        self.engine_died: bool | None = None

    def attach(self, engine_client: Any) -> None:
        """Make an engine's client wait for open requests before a signal shuts it down.

        vLLM lets the engine finish its running requests, but first ends the threads that process prompts: requests that
        it has accepted and not yet handed to the engine would get 500, or wait forever.

        Args:
            engine_client: vLLM's `AsyncLLM`.
        """
        # None where the engine runs in this process.
        resources = getattr(engine_client.engine_core, "resources", None)

        def wait_first(shutdown: Callable[..., Any], timeout: float | None = None) -> Any:
            if resources is not None and self.engine_died is None:
                self.engine_died = resources.engine_dead  # a shutdown sets it too, and vLLM calls it twice
            if timeout and not engine_client.errored and not _in_event_loop():
                timeout = self.drain(timeout)
            self.draining = self.ended = True
            result = shutdown(timeout=timeout)
            self._end_open_requests()
            return result

        hook_shutdown(engine_client, wait_first)

    def drain(self, timeout_seconds: float) -> float:
        """Refuse new requests and wait for open ones. Not for the thread of the event loop, which answers them.

        Returns:
            Seconds left of the timeout.
        """
        self.draining = True
        deadline = time.monotonic() + timeout_seconds
        while self.open_tasks and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        return max(0.0, deadline - time.monotonic())

    def _end_open_requests(self) -> None:
        """Cancel the requests that are still open shortly after the engine's end.

        Those that had not reached the engine would wait for it, and uvicorn for them.
        """
        for task in tuple(self.open_tasks):
            loop = task.get_loop()
            loop.call_soon_threadsafe(loop.call_later, FLUSH_SECONDS, self._cancel, task)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if task in self.open_tasks:
            task.cancel()


def _in_event_loop() -> bool:
    """Whether this thread answers requests; the shutdown of a signal runs in another one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class ShutdownGate:
    """ASGI middleware that records open requests, and answers 503 to later ones and to those that are left in the end.

    Other GET routes, such as /metrics, stay open; /health does not, so that balancers look elsewhere.
    """

    def __init__(self, app: ASGIApp, shutdown: Shutdown) -> None:
        """Wrap an application.

        Args:
            app: vLLM's application.
            shutdown: its state.
        """
        self.app = app
        self.shutdown = shutdown

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or (scope["method"] != "POST" and scope["path"] != "/health"):
            await self.app(scope, receive, send)
            return
        if self.shutdown.draining:
            message = "the server is shutting down and accepts no more requests"
            await _unavailable(message)(scope, receive, send)
            return
        is_started = is_replaced = False

        async def send_on(message: Message) -> None:
            nonlocal is_started, is_replaced
            if message["type"] == "http.response.start":
                # vLLM's errors about threads and an engine that are gone.
                failed = message["status"] >= HTTPStatus.INTERNAL_SERVER_ERROR
                is_replaced = failed and self.shutdown.ended and not self.shutdown.engine_died
                is_started = True
                if is_replaced:
                    await _unavailable(LEFT)(scope, receive, send)
            if not is_replaced:
                await send(message)

        task = asyncio.current_task()
        assert task is not None
        self.shutdown.open_tasks.add(task)
        try:
            await self.app(scope, receive, send_on)
        except asyncio.CancelledError:
            if not self.shutdown.ended:
                raise
            task.uncancel()
            # A stream that has begun ends without its last event.
            if not is_started:
                await _unavailable(LEFT)(scope, receive, send)
        except Exception:
            # A thread is gone. Without a handler its error would become 500 outside of this middleware.
            if is_started or not self.shutdown.ended or self.shutdown.engine_died:
                raise
            await _unavailable(LEFT)(scope, receive, send)
        finally:
            self.shutdown.open_tasks.discard(task)


def _unavailable(message: str) -> JSONResponse:
    headers = {"Retry-After": str(RETRY_SECONDS), "Connection": "close"}
    return error_response(message, HTTPStatus.SERVICE_UNAVAILABLE, headers=headers)
