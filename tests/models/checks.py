"""Checks that the models' tests share."""

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from vllm import LLM

from tests.support.compare import NUM_TOKENS, assert_equal
from tests.support.engine import ask, request


def assert_images_equal(
    engine: LLM, reference: Any, prompt: str, images: Sequence[Image.Image], keep: int, **fields: Any
) -> None:
    """Each image alone with a question, in one step, against a reference.

    Args:
        engine: asked.
        reference: its `generate` answers a prompt with images and their budgets.
        prompt: with one image.
        images: of the requests.
        keep: budget of each.
        fields: of the requests beside it.
    """
    requests = [request(prompt, [image], ficoco_keep=keep, **fields) for image in images]
    for image, answer in zip(images, ask(engine, requests, NUM_TOKENS), strict=True):
        tokens, logprobs = reference.generate(prompt, [(image, keep)], NUM_TOKENS)
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def assert_together_equals_alone(
    engine: LLM, requests: Sequence[dict[str, Any]], num_tokens: int = NUM_TOKENS, *, ends: bool = False
) -> None:
    """Requests in one step against each alone, without caches.

    Args:
        engine: asked.
        requests: of one step.
        num_tokens: of an answer.
        ends: see `assert_equal`.
    """

    def forget() -> None:
        engine.reset_prefix_cache()
        engine.llm_engine.reset_mm_cache()

    forget()
    for one, answer in zip(requests, ask(engine, requests, num_tokens), strict=True):
        forget()
        (alone,) = ask(engine, [one], num_tokens)
        assert_equal(answer.tokens, answer.logprobs, alone.tokens, alone.logprobs, ends=ends)


def use_head_by_head(monkeypatch: pytest.MonkeyPatch, family: str) -> list[int]:
    """Let a tower take `centred_attention` wherever its dtype and device are asked about.

    Args:
        monkeypatch: undoes it.
        family: module of its layers.

    Returns:
        Tokens of each such layer that runs.
    """
    layers: list[int] = []

    def always(values: Tensor) -> bool:
        layers.append(values.shape[-2])
        return True

    for module in (family, "ficoco_vllm.vision.tower"):
        monkeypatch.setattr(f"{module}.is_faster", always)
    return layers
