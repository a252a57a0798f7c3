"""Limit of request bodies, on every route."""

import os
from http import HTTPStatus

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.environment import MAX_BODY_BYTES
from ficoco_vllm.server.openai_errors import error_response


class TooLargeError(HTTPException):
    """HTTP 413. Where a route reads the body, vLLM's own handler turns it into a response."""

    def __init__(self, max_bytes: int) -> None:
        message = f"the body is too large; allowed: up to {max_bytes} bytes (--ficoco-max-body-mb)"
        super().__init__(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message)


class BodyLimit:
    """ASGI middleware that answers 413 to a body that is too large, and never holds it in memory.

    `ficoco-vllm serve` passes it to vLLM's `--middleware`, which gives it no arguments.
    """

    def __init__(self, app: ASGIApp, max_bytes: int | None = None) -> None:
        """Wrap an application.

        Args:
            app: vLLM's application.
            max_bytes: limit of a body, 0 for none; None reads the environment.
        """
        self.app = app
        self.max_bytes = int(os.environ.get(MAX_BODY_BYTES, "0")) if max_bytes is None else max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not self.max_bytes:
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "")
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_bytes or (declared.isdecimal() and int(declared) > self.max_bytes):
                await self._drain(receive, message)
                raise TooLargeError(self.max_bytes)
            return message

        try:
            await self.app(scope, limited, send)
        except TooLargeError as error:  # raised in another middleware, outside of vLLM's handlers
            await error_response(error.detail, error.status_code)(scope, receive, send)

    async def _drain(self, receive: Receive, message: Message) -> None:
        """Discard up to `max_bytes` more: a client that is still sending would not read the 413."""
        remaining = self.max_bytes
        while message.get("more_body") and remaining > 0:
            message = await receive()
            remaining -= len(message.get("body", b""))
