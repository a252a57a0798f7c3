"""Compiled against eager, two workers against one: the same answers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.decoder import window_calls
from tests.decoder.calls import Ask, ask, compiled_units
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.remote import Host, Remote, remote_engine

# float32; fused loops and sums over heads and columns that are split between workers
TOLERANCE = 1e-4
FICOCO: dict[str, Any] = {"method": "ficoco-l", "keep": 16, "num_segments": 4, "windows": "turn"}

pytestmark = [pytest.mark.compat, pytest.mark.engine, pytest.mark.long]


def asks(images: list[Image.Image]) -> list[Ask]:
    """Methods that look at different signals, in one step with text."""
    return [
        Ask(PROMPT, [images[0]]),
        Ask(TEXT_ONLY),
        Ask(TWO_IMAGES, images[1:3], extra={"ficoco_keep": 64}),
        Ask(PROMPT, [images[3]], extra={"ficoco_method": "sparsevlm", "ficoco_keep": 30}),
        Ask(PROMPT, [images[4]], extra={"ficoco_method": "fastv"}),
        Ask(PROMPT, [images[5]], extra={"ficoco_method": "fitprune"}),
        Ask(PROMPT, [images[0]], extra={"ficoco_method": "pyramiddrop", "ficoco_keep": 9}),
    ]


def cached(one: Ask, reply: window_calls.Reply) -> int:
    """Whole blocks of a prompt before its last token; after the image, where it loses whole blocks."""
    whole = (reply.num_prompt_tokens - 1) // 32 * 32
    return 0 if one.extra.get("ficoco_keep") == 9 else whole


@pytest.fixture(scope="module")
def expected(host: Host, small_llava: Path, images: list[Image.Image]) -> list[Answer]:
    """One worker, eager."""
    answers: list[Answer] = host.get(small_llava, FICOCO, block_size=32).call(ask, asks(images))
    return answers


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, {"enforce_eager": False}),
        (
            {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
            {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
        ),
    ],
    ids=["compiled", "two workers"],
)
def test_equal(
    small_llava: Path,
    images: list[Image.Image],
    expected: list[Answer],
    environment: dict[str, str],
    options: dict[str, Any],
) -> None:
    with remote_engine(small_llava, FICOCO, environment, block_size=32, **options) as engine:
        first = engine.call(window_calls.ask, asks(images))
        again = engine.call(window_calls.ask, asks(images))
        if "enforce_eager" in options:
            assert engine.call(compiled_units) == [True] * FICOCO["num_segments"]
    assert not any(reply.num_cached for reply in first)
    # The second time from the prefix cache.
    assert [reply.num_cached for reply in again] == [
        cached(one, reply) for one, reply in zip(asks(images), again, strict=True)
    ]
    for replies in (first, again):
        for reply, one in zip(replies, expected, strict=True):
            assert reply.tokens == one.tokens
            torch.testing.assert_close(reply.logprobs, one.logprobs, atol=TOLERANCE, rtol=0)


def test_tower_and_decoder_over_two_workers(host: Host, small_llava: Path, images: list[Image.Image]) -> None:
    """Compiled, so that both are split and both are compiled at once."""
    both: dict[str, Any] = {"method": "ficoco-vl", "keep": 16, "num_segments": 4}
    mixture = [*asks(images)[:2], Ask(TWO_IMAGES, images[1:3], extra={"ficoco_keep": 30})]
    expected = host.get(small_llava, both, block_size=32).call(ask, mixture)
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"}
    options: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with remote_engine(
        small_llava, both, environment, block_size=32, enforce_eager=False, **options
    ) as engine:
        answers = engine.call(ask, mixture)
    for answer, one in zip(answers, expected, strict=True):
        assert answer.tokens == one.tokens
        torch.testing.assert_close(answer.logprobs, one.logprobs, atol=TOLERANCE, rtol=0)


def test_the_check_can_fail(small_engine: Remote, images: list[Image.Image], expected: list[Answer]) -> None:
    """Negative control: eight segments reduce in other layers."""
    (answer,) = small_engine.call(ask, [Ask(PROMPT, [images[0]])])
    assert (answer.logprobs - expected[0].logprobs).abs().max() > 10 * TOLERANCE
