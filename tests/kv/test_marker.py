"""The generation prompt of chat templates, by which decision windows end."""

from typing import Any

import pytest
from vllm.renderers.params import ChatParams

from ficoco_vllm.kv.marker import generation_prompt

pytestmark = pytest.mark.compat


class Renderer:
    """Stands in for vLLM's renderer: a template around a message, one token a character."""

    def __init__(self, before: str, after: str, answer: str) -> None:
        self.before, self.after, self.answer = before, after, answer

    def render_chat(self, conversations: Any, params: ChatParams, **_: Any) -> tuple[Any, Any]:
        """The conversations and prompts that vLLM returns."""
        ((message,),) = conversations
        assert params.chat_template == "the server's"
        assert params.chat_template_kwargs["of the server"]
        answer = self.answer if params.chat_template_kwargs["add_generation_prompt"] else ""
        text = self.before + message["content"] + self.after + answer
        return [], [{"prompt_token_ids": [ord(character) for character in text]}]


PARAMS = ChatParams(chat_template="the server's", chat_template_kwargs={"of the server": True})


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (("USER: ", " ", "ASSISTANT:"), "ASSISTANT:"),
        (("<user>", "</s>", "<assistant>"), "<assistant>"),
        (("", "\n", ""), ""),
    ],
)
def test_the_marker_is_what_the_template_appends(template: tuple[str, str, str], expected: str) -> None:
    assert generation_prompt(Renderer(*template), PARAMS) == [ord(character) for character in expected]


def test_a_model_without_template_has_no_marker() -> None:
    assert generation_prompt(None, PARAMS) == []
