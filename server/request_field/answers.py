"""What the answers of vLLM's routes tell beside their own: `usage.ficoco` and response headers."""

import json
from collections.abc import AsyncIterator
from functools import wraps
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.server.request_field.ledger import Control, Ledger, current
from ficoco_vllm.server.request_field.routes import CONTROLLED, HANDLERS
from ficoco_vllm.server.request_field.schema import FIELD, FicocoUsage

# On the state of a request of Starlette.
STATE = "ficoco_usage"


def attach(control: Control, state: Any) -> None:
    """Let vLLM's handlers read the field and tell what came of it.

    Args:
        control: of this server.
        state: of the server, with vLLM's handlers.
    """
    for name, method, _ in HANDLERS:
        handler = getattr(state, name, None)
        if handler is not None:
            setattr(handler, method, _controlled(control, getattr(handler, method)))
    setattr(state, CONTROLLED, True)


def _controlled(control: Control, original: Any) -> Any:
    @wraps(original)
    async def handle(request: Any, raw_request: Any = None) -> Any:
        ledger = control.open(request)
        token = current.set(ledger)
        try:
            answer = await original(request, raw_request)
        finally:
            current.reset(token)
        return _told(answer, ledger, raw_request)

    return handle


def _told(answer: Any, ledger: Ledger, raw_request: Any) -> Any:
    usage = ledger.usage()
    if usage is None:
        return answer
    if hasattr(answer, "__aiter__"):
        answer = _stream(answer, usage)
    elif getattr(answer, "usage", None) is not None:
        setattr(answer.usage, FIELD, usage.model_dump())
    else:
        return answer  # an error
    if raw_request is not None:
        setattr(raw_request.state, STATE, usage)
    return answer


async def _stream(events: AsyncIterator[Any], usage: FicocoUsage) -> AsyncIterator[Any]:
    """Server-sent events; those that tell the usage, if the client asked for it, tell ours too.

    Those of responses are objects yet; the last one holds the whole response.
    """
    async for event in events:
        if isinstance(event, str):
            yield _with_usage(event, usage) if '"usage"' in event else event
            continue
        told = getattr(getattr(event, "response", None), "usage", None)
        if told is not None:
            setattr(told, FIELD, usage.model_dump())
        yield event


def _with_usage(event: str, usage: FicocoUsage) -> str:
    prefix = "data: "
    body = event.removeprefix(prefix).strip()
    if not event.startswith(prefix) or not body.startswith("{"):
        return event
    chunk = json.loads(body)
    if not chunk.get("usage"):
        return event
    chunk["usage"][FIELD] = usage.model_dump()
    return f"{prefix}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


class UsageHeaders:
    """ASGI middleware: what `usage.ficoco` tells, as headers of the response too."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application.

        Args:
            app: of vLLM.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_told(message: Message) -> None:
            usage = scope.get("state", {}).get(STATE)
            if message["type"] == "http.response.start" and usage is not None:
                message = {**message, "headers": [*message.get("headers", ()), *_headers(usage)]}
            await send(message)

        await self.app(scope, receive, send_told)


def _headers(usage: FicocoUsage) -> list[tuple[bytes, bytes]]:
    return [
        (f"x-ficoco-{name.replace('_', '-')}".encode(), str(value).encode())
        for name, value in usage.model_dump().items()
    ]
