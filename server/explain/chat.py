"""One timed chat through vLLM's own handler."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse


class RefusedError(Exception):
    """vLLM refused a chat. Carries its error for the client."""

    def __init__(self, response: ErrorResponse) -> None:
        super().__init__(response.error.message)
        self.response = response


@dataclass(frozen=True)
class Reply:
    """Answer to a chat, with its token counts and times.

    Attributes:
        text: the answer.
        ttft_seconds: time from the call to the first words.
        total_seconds: time from the call to the end.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    total_seconds: float


async def send_chat(handler: Any, request: ChatCompletionRequest, raw_request: Any) -> Reply:
    """Send a streaming chat and join its chunks.

    Args:
        handler: vLLM's `OpenAIServingChat`.
        request: chat with `stream` and `stream_options.include_usage`.
        raw_request: the client's request, for its headers and priorities.

    Raises:
        RefusedError: vLLM answered with an error.
        VLLMValidationError: the request is not allowed.
    """
    start = time.monotonic()
    chunks = await handler.create_chat_completion(request, raw_request)
    if isinstance(chunks, ErrorResponse):
        raise RefusedError(chunks)
    text, usage = "", {"prompt_tokens": 0, "completion_tokens": 0}
    first: float | None = None
    async for chunk in _events(chunks):
        if "error" in chunk:
            raise RefusedError(ErrorResponse.model_validate(chunk))
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            words = choice["delta"].get("content") or ""
            if words and first is None:
                first = time.monotonic()
            text += words
    end = time.monotonic()
    return Reply(
        text=text,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
        ttft_seconds=(end if first is None else first) - start,
        total_seconds=end - start,
    )


async def _events(chunks: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The JSON objects of a stream of server-sent events."""
    async for event in chunks:
        for line in event.splitlines():
            data = line.removeprefix("data: ").strip()
            if line.startswith("data: ") and data != "[DONE]":
                yield json.loads(data)
