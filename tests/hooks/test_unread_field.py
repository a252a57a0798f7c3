"""The field `ficoco` without an endpoint of ours that reads it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from ficoco_vllm.hooks.unread_field import READ, hook_renderer


class ReachedError(Exception):
    """The method of vLLM was called."""


@pytest.fixture
def renderer(monkeypatch: pytest.MonkeyPatch) -> OnlineRenderer:
    """A renderer whose methods only report that they were called."""

    async def reach(self: Any, *_: Any, **__: Any) -> None:
        raise ReachedError

    for name in ("preprocess_chat", "preprocess_cmpl"):
        monkeypatch.setattr(OnlineRenderer, name, reach)
    hook_renderer()
    return OnlineRenderer.__new__(OnlineRenderer)


@pytest.mark.parametrize("name", ["preprocess_chat", "preprocess_cmpl"])
def test_refused_unless_an_endpoint_reads_it(renderer: OnlineRenderer, name: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with_field, elsewhere = (
        ChatCompletionRequest.model_validate({"messages": messages} | field)
        for field in ({"ficoco": {"keep": 9}}, {"extra_body": {"ficoco": {"keep": 9}}})
    )
    without = ChatCompletionRequest.model_validate({"messages": messages, "other": 1})
    preprocess = getattr(renderer, name)
    with pytest.raises(VLLMValidationError, match="ficoco is not read here") as caught:
        asyncio.run(preprocess(with_field, []))
    assert caught.value.parameter == "ficoco"
    with pytest.raises(VLLMValidationError, match=r"extra_body.ficoco is not read here"):
        asyncio.run(preprocess(elsewhere, []))
    for request in (without, SimpleNamespace()):
        with pytest.raises(ReachedError):
            asyncio.run(preprocess(request, []))
    setattr(renderer, READ, True)
    with pytest.raises(ReachedError):
        asyncio.run(preprocess(with_field, []))


def test_hooked_once(renderer: OnlineRenderer) -> None:
    before = OnlineRenderer.preprocess_chat
    hook_renderer()
    assert OnlineRenderer.preprocess_chat is before
