"""Which of vLLM's routes read the field `ficoco`; the others say that they do not."""

import json
from http import HTTPStatus
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.server.openai_errors import error_answer
from ficoco_vllm.server.request_field.schema import FIELD

# On the server's state: whether requests choose for themselves.
CONTROLLED = "ficoco_controlled"
# Handler on vLLM's state, its method, and the routes that it answers.
HANDLERS = (
    ("openai_serving_chat", "create_chat_completion", "/v1/chat/completions"),
    ("openai_serving_chat_batch", "create_batch_chat_completion", "/v1/chat/completions/batch"),
    ("openai_serving_completion", "create_completion", "/v1/completions"),
    ("openai_serving_responses", "create_responses", "/v1/responses"),
    ("serving_tokenization", "create_tokenize", "/tokenize"),
)
READ = tuple(path for _, _, path in HANDLERS)
# Hands its bodies to the handlers of chats and completions.
_SAGEMAKER = "/invocations"
_OURS = "/ficoco/"


class FieldGuard:
    """ASGI middleware: on a route that would ignore the field, it is answered with 400.

    vLLM drops what its bodies do not know, and a client would believe that its wish was granted.
    """

    def __init__(self, app: ASGIApp) -> None:
        """Wrap an application.

        Args:
            app: of vLLM.
        """
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if not _is_deaf(scope):
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        if _names_field(b"".join(message.get("body", b"") for message in messages)):
            message = (
                f"{FIELD} is not read by {_path(scope)}; allowed: without it, or one of {', '.join(READ)}"
            )
            await error_answer(message, HTTPStatus.BAD_REQUEST, FIELD)(scope, receive, send)
            return
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_deaf(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "POST":
        return False
    path = _path(scope)
    reads = path in READ or path == _SAGEMAKER or path.startswith(_OURS)
    return not reads and getattr(scope["app"].state, CONTROLLED, False)


def _names_field(body: bytes) -> bool:
    if f'"{FIELD}"'.encode() not in body:
        return False  # almost all of them, without a second look
    try:
        content: Any = json.loads(body)
    except ValueError:
        return False
    return isinstance(content, dict) and FIELD in content
