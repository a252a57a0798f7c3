"""The routes of vLLM that read the field `ficoco`; all others refuse it. Both are part of `/openapi.json`."""

import json
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ficoco_vllm.hooks.api_server import hook_schema
from ficoco_vllm.request_fields import FIELD, PREFIX, find_misplaced
from ficoco_vllm.server.openai_errors import error_response
from ficoco_vllm.server.request_field.schema import OFF, FicocoRequest

# Handler on vLLM's state, its method, and the route that it answers.
HANDLERS = (
    ("openai_serving_chat", "create_chat_completion", "/v1/chat/completions"),
    ("openai_serving_chat_batch", "create_batch_chat_completion", "/v1/chat/completions/batch"),
    ("openai_serving_completion", "create_completion", "/v1/completions"),
    ("openai_serving_responses", "create_responses", "/v1/responses"),
    ("serving_tokenization", "create_tokenize", "/tokenize"),
)
ROUTES = tuple(path for _, _, path in HANDLERS)
# Forwards its bodies to the handlers of chats and completions.
_SAGEMAKER = "/invocations"
_OURS = "/ficoco/"
_COMPONENTS = "#/components/schemas/"


class FieldGuard:
    """ASGI middleware that answers 400 where a route would ignore the field.

    vLLM drops unknown fields, so the client would believe that its method and budget were applied.
    """

    def __init__(self, app: ASGIApp, is_active: Callable[[], bool]) -> None:
        """Wrap an application.

        Args:
            app: vLLM's application.
            is_active: whether this server reads the field at all.
        """
        self.app = app
        self.is_active = is_active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        is_post = scope["type"] == "http" and scope["method"] == "POST"
        if not is_post or _reads_field(_path(scope)) or not self.is_active():
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        path = _field_of(b"".join(message.get("body", b"") for message in messages))
        if path is not None:
            message = (
                f"{path} is not read by {_path(scope)}; allowed: without it, or one of {', '.join(ROUTES)}"
            )
            await error_response(message, HTTPStatus.BAD_REQUEST, path)(scope, receive, send)
            return
        messages.reverse()

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _reads_field(path: str) -> bool:
    return path in ROUTES or path == _SAGEMAKER or path.startswith(_OURS)


def _field_of(body: bytes) -> str | None:
    """Path of our field in a body, None without it."""
    if PREFIX.encode() not in body.lower():
        return None  # nearly all bodies need no parsing
    try:
        content: Any = json.loads(body)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    return FIELD if FIELD in content else find_misplaced(content)


def publish(app: FastAPI) -> None:
    """Add the field to `/openapi.json`.

    Args:
        app: vLLM's application.
    """

    def openapi(original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        is_new = app.openapi_schema is None
        schema = original()
        if is_new:  # FastAPI returns the same object from then on
            _describe(schema)
        return schema

    hook_schema(app, openapi)


def _describe(schema: dict[str, Any]) -> None:
    """Add the field to the bodies of the routes that read it, in place."""
    components = schema["components"]["schemas"]
    components[FicocoRequest.__name__] = FicocoRequest.model_json_schema()
    field = {
        "anyOf": [{"const": OFF}, {"$ref": _COMPONENTS + FicocoRequest.__name__}, {"type": "null"}],
        "description": "Reduction of the images' visual tokens; the server's own method and budget without it.",
    }
    for path in ROUTES:
        operation = schema["paths"].get(path, {}).get("post", {})
        body = (
            operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        )
        for option in body.get("anyOf", [body]):
            name = option.get("$ref", "").removeprefix(_COMPONENTS)
            if name in components:
                components[name]["properties"][FIELD] = field
