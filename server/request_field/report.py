"""Report of the applied method and budget in responses: `usage.ficoco` and the headers `x-ficoco-*`."""

import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.request_fields import FIELD
from ficoco_vllm.server.request_field.schema import FicocoUsage

# Attribute of Starlette's request state, from the handler to the middleware.
_USAGE = "ficoco"


def add_usage(response: Any, usage: FicocoUsage, raw_request: Any) -> Any:
    """Add a request's usage to the response of vLLM's handler.

    Args:
        response: object with a usage, an error, or a stream of events.
        usage: effect of the reduction.
        raw_request: Starlette's request, if there is one; the headers are added to its response.
    """
    if hasattr(response, "__aiter__"):
        response = _stream(response, usage)
    elif getattr(response, "usage", None) is not None:
        setattr(response.usage, FIELD, usage.model_dump())
    else:
        return response  # an error
    if raw_request is not None:
        setattr(raw_request.state, _USAGE, usage)
    return response


async def _stream(events: AsyncIterator[Any], usage: FicocoUsage) -> AsyncIterator[Any]:
    """Server-sent events; those that carry a usage get ours too.

    The events of the Responses API are still objects; the last one holds the whole response.
    """
    async for event in events:
        if isinstance(event, str):
            yield _with_usage(event, usage) if '"usage"' in event else event
            continue
        response_usage = getattr(getattr(event, "response", None), "usage", None)
        if response_usage is not None:
            setattr(response_usage, FIELD, usage.model_dump())
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
    """ASGI middleware that repeats `usage.ficoco` in the headers of the response."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application.

        Args:
            app: vLLM's application.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_usage(message: Message) -> None:
            usage: FicocoUsage | None = scope.get("state", {}).get(_USAGE)
            if message["type"] == "http.response.start" and usage is not None:
                headers = [
                    (f"x-ficoco-{name.replace('_', '-')}".encode(), str(value).encode())
                    for name, value in usage.model_dump().items()
                ]
                message = {**message, "headers": [*message.get("headers", ()), *headers]}
            await send(message)

        await self.app(scope, receive, send_with_usage)
