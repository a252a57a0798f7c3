"""Objects of one API server that its endpoint changes: handlers, renderer, schema, engine client."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ficoco_vllm.hooks.wrapping import wrap


def hook_handlers(state: Any, handlers: Mapping[str, str], around: Callable[..., Any]) -> None:
    """Answer requests through a coroutine function of ours.

    Args:
        state: application state of vLLM's server.
        handlers: attribute of the state, which lacks those that are not served, to the handler's method.
        around: called as `around(handler, request, raw_request)`.
    """
    for name, method in handlers.items():
        handler = getattr(state, name, None)
        if handler is not None:
            wrap(handler, method, around)


def hook_prompts(renderer: Any, trusting: Any, around: Callable[..., Any]) -> None:
    """Render the prompts of chats and completions, which those of all routes are, through a coroutine function of ours.

    Args:
        renderer: vLLM's `OnlineRenderer`.
        trusting: another one, for requests whose arguments are ours.
        around: called as `around(render_trusting, is_chat, render, request, messages, ...)`.
    """
    for name, is_chat in (("preprocess_chat", True), ("preprocess_cmpl", False)):
        wrap(renderer, name, partial(around, getattr(trusting, name), is_chat))


def hook_chats(renderer: Any, around: Callable[..., Any]) -> None:
    """Render the prompts of chats alone through `around(render, request, messages, ...)`."""
    wrap(renderer, "preprocess_chat", around)


def hook_schema(app: Any, around: Callable[..., Any]) -> None:
    """Publish the OpenAPI schema of a FastAPI application as `around(original)` returns it."""
    wrap(app, "openapi", around)


def hook_generation(engine_client: Any, around: Callable[..., Any]) -> None:
    """Send prompts to vLLM's `AsyncLLM` through `around(generate, prompt, params, ...)`."""
    wrap(engine_client, "generate", around)


def hook_shutdown(engine_client: Any, around: Callable[..., Any]) -> None:
    """Shut vLLM's `AsyncLLM` down through `around(shutdown, timeout)`."""
    wrap(engine_client, "shutdown", around)
