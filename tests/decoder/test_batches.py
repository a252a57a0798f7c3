"""Many requests in one engine: each as if it were alone, and every block comes back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.decoder import calls
from tests.decoder.calls import Ask
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.remote import Remote, remote_engine

# float32; the order of sums depends on the shapes of a batch, see test_reference.py
TOLERANCE = 1e-4
LONG_TEXT = "<s>USER: " + "is there a red sign in the corner of the room? " * 6 + "ASSISTANT:"
XARGS: list[dict[str, Any]] = [
    {},
    {"ficoco_keep": 64},
    {"ficoco_method": "fastv", "ficoco_keep": 9},
    {"ficoco_method": "sparsevlm", "ficoco_keep": 30},
    {"ficoco_method": "pyramiddrop", "ficoco_keep": 72},
    {"ficoco_method": "fitprune", "ficoco_keep": 40},
    {"ficoco_keep": 144},
]

pytestmark = pytest.mark.engine


def mixed(images: list[Image.Image], count: int) -> list[Ask]:
    """Images, two images, text, long text; methods, budgets and lengths mixed."""
    asks = []
    for index in range(count):
        kind = index % 5
        extra = XARGS[index % len(XARGS)]
        num_tokens = (2, 5, 12, 3)[index % 4]
        if kind in (0, 1):
            text = PROMPT if index % 2 else PROMPT.replace("what number", "tell me quickly what number")
            asks.append(Ask(text, [images[index % len(images)]], num_tokens, extra))
        elif kind == 2:
            asks.append(Ask(TWO_IMAGES, [images[index % 3], images[3 + index % 3]], num_tokens, extra))
        else:
            asks.append(Ask(TEXT_ONLY if kind == 3 else LONG_TEXT, [], num_tokens))
    return asks


@pytest.fixture(scope="module")
def engine(small_llava: Path) -> Iterator[Remote]:
    """So few blocks that requests must give theirs back: eight groups of 16 blocks hold one longest request."""
    options = {"block_size": 32, "max_model_len": 512, "max_num_seqs": 16, "num_gpu_blocks_override": 140}
    with remote_engine(small_llava, {"method": "ficoco-l", "keep": 16}, **options) as engine:
        yield engine


def test_40_mixed_requests_with_preemption_equal_each_alone(
    engine: Remote, images: list[Image.Image]
) -> None:
    asks = mixed(images, 40)
    free = engine.call(calls.free_blocks)
    together, num_preempted = engine.call(calls.ask_counting_preemptions, asks)
    assert num_preempted > 0
    assert engine.call(calls.free_blocks) == free
    for one, answer in zip(asks, together, strict=True):
        (alone,) = engine.call(calls.ask, [one])
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_steps", [0, 1, 2, 4])
def test_aborts_give_everything_back(engine: Remote, images: list[Image.Image], num_steps: int) -> None:
    """While waiting, in the prefill, in the first and in later decoding steps."""
    free = engine.call(calls.free_blocks)
    engine.call(calls.abort_at, mixed(images, 12), num_steps)
    assert engine.call(calls.free_blocks) == free
    assert not any(engine.call(calls.held))


def test_2000_requests_leave_no_block_behind(engine: Remote, images: list[Image.Image]) -> None:
    free = engine.call(calls.free_blocks)
    batch = mixed(images, 10) + [Ask(TEXT_ONLY)] * 30
    assert engine.call(calls.repeat_short, batch, 50) == {free}
    assert not any(engine.call(calls.held))


@pytest.mark.parametrize(
    ("extra", "counts"),
    [
        # even over the layers 3 to 6: 128 removed in four steps of 32
        ({}, (144, 144, 144, 144, 112, 80, 48, 16)),
        ({"ficoco_keep": 9}, (144, 144, 144, 144, 110, 76, 42, 9)),
        ({"ficoco_method": "fastv", "ficoco_keep": 9}, (144, 144, 9, 9, 9, 9, 9, 9)),
        ({"ficoco_keep": 144}, (144,) * 8),
    ],
)
def test_slots_written_and_blocks_held_are_the_plans(
    engine: Remote, images: list[Image.Image], extra: dict[str, Any], counts: tuple[int, ...]
) -> None:
    """Counted in the cache itself, layer by layer."""
    written, blocks, num_tokens = engine.call(
        calls.written_slots, Ask(PROMPT, [images[0]], num_tokens=5, extra=extra)
    )
    expected = [num_tokens - 144 + count for count in counts]
    assert written == expected
    assert blocks == [-(-tokens // 32) for tokens in expected]
