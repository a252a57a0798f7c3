"""Tokens that a chat template appends for the answer: the end of a user's turn in any later prompt of the chat."""

from dataclasses import replace
from typing import Any

from vllm.logger import init_logger

# A child of vLLM's logger, whose handlers and level it shares.
logger = init_logger("vllm.ficoco.windows")

_TEXTS = ("what is this?", "Tell me more")


def generation_prompt(renderer: Any, chat_params: Any) -> list[int]:
    """The generation prompt of a chat template, independent of the messages.

    Prompts of two messages end in it, and the same prompts without a place for the answer do not.

    Args:
        renderer: vLLM's renderer of the served model.
        chat_params: vLLM's `ChatParams` of the server.

    Returns:
        Token ids; none where the model has no chat template or its template appends nothing.
    """

    def render(text: str, with_answer: bool) -> list[int]:
        kwargs = {**chat_params.chat_template_kwargs, "add_generation_prompt": with_answer}
        params = replace(chat_params, chat_template_kwargs=kwargs)
        _, (prompt,) = renderer.render_chat([[{"role": "user", "content": text}]], params, skip_mm_cache=True)
        return list(prompt["prompt_token_ids"])

    try:
        one, other = (render(text, True) for text in _TEXTS)
        without = render(_TEXTS[0], False)
    # A template is a program of the model's authors, which may raise anything.
    except Exception as error:
        logger.warning("ficoco: decision windows end with the prompt: no chat template (%s)", error)
        return []
    before = _num_equal(one, without)
    after = _num_equal(one[::-1], other[::-1])
    marker = one[max(len(one) - after, before) :]
    if not marker:
        logger.warning("ficoco: decision windows end with the prompt: the chat template appends nothing")
    return marker


def _num_equal(one: list[int], other: list[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
