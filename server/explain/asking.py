"""One chat through vLLM's own handler, with a clock beside it."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse


class RefusedError(Exception):
    """vLLM did not answer a chat; carries its error for the client."""

    def __init__(self, response: ErrorResponse) -> None:
        super().__init__(response.error.message)
        self.response = response


@dataclass(frozen=True)
class Reply:
    """An answer, what it took, and how long.

    Attributes:
        text: the answer.
        prompt_tokens: as vLLM counts them.
        completion_tokens: as vLLM counts them.
        ttft_seconds: from the call to the first words.
        total_seconds: from the call to the end.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    ttft_seconds: float
    total_seconds: float


async def ask(handler: Any, request: ChatCompletionRequest, raw_request: Any) -> Reply:
    """Send a streaming chat and gather its chunks.

    Args:
        handler: vLLM's `OpenAIServingChat`.
        request: with `stream` and `stream_options.include_usage`.
        raw_request: of the client, for its headers and priorities.

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
