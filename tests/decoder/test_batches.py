"""Many requests in one engine: each is answered as if it were alone, and every block comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.decoder import calls, window_calls
from tests.decoder.calls import Ask
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.planned import kv_tokens
from tests.support.remote import Host, Remote

# float32; the order of sums depends on the shapes of a batch, see test_reference.py
TOLERANCE = 1e-4
# What one longest request needs: eight groups of 16 blocks of 32 tokens, and the block that vLLM holds back.
BLOCKS = 8 * 16 + 1
# Among the 40: one image, and two. An answer of 80 tokens fills blocks of every group while it is written.
LONG_ANSWERS = (1, 7)
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

pytestmark = [pytest.mark.compat, pytest.mark.engine]


def mixed(images: list[Image.Image], count: int) -> list[Ask]:
    """Images, two images, text, long text; methods, budgets and lengths mixed."""
    asks = []
    for index in range(count):
        kind = index % 5
        extra = XARGS[index % len(XARGS)]
        num_tokens = 80 if index in LONG_ANSWERS else (2, 5, 12, 3)[index % 4]
        if kind in (0, 1):
            text = PROMPT if index % 2 else PROMPT.replace("what number", "tell me quickly what number")
            asks.append(Ask(text, [images[index % len(images)]], num_tokens, extra))
        elif kind == 2:
            asks.append(Ask(TWO_IMAGES, [images[index % 3], images[3 + index % 3]], num_tokens, extra))
        else:
            asks.append(Ask(TEXT_ONLY if kind == 3 else LONG_TEXT, [], num_tokens))
    return asks


# Too few blocks for all requests, so that some are preempted; with the minimum too few would run at once.
OPTIONS: dict[str, Any] = {
    "block_size": 32,
    "max_model_len": 512,
    "max_num_seqs": 16,
    "num_gpu_blocks_override": BLOCKS + 11,
}


@pytest.fixture(scope="module")
def engine(host: Host, small_llava: Path) -> Remote:
    """Prompts are computed whole."""
    return host.get(small_llava, {"method": "ficoco-l", "keep": 16}, **OPTIONS)


@pytest.fixture(scope="module")
def windowed(host: Host, small_llava: Path) -> Remote:
    """The same with prefix cache and prompts in pieces: a step holds two windows."""
    ficoco = {"method": "ficoco-l", "keep": 16, "windows": "turn"}
    return host.get(small_llava, ficoco, **OPTIONS, max_num_batched_tokens=400)


@pytest.fixture(scope="module")
def alone(engine: Remote, images: list[Image.Image]) -> list[Answer]:
    """Answers to the mixed requests, each alone in the engine."""
    return [engine.call(calls.ask, [one])[0] for one in mixed(images, 40)]


def test_a_cache_without_room_for_the_longest_request_does_not_start(engine: Remote) -> None:
    """Every group has blocks for an unreduced prompt, so that no accepted request waits forever."""
    assert engine.call(calls.cache_error, BLOCKS) == ""
    result = engine.call(calls.cache_error, BLOCKS - 1)
    assert "To serve at least one request with the model's max seq len (512)" in result


def test_40_mixed_requests_with_preemption_equal_each_alone(
    engine: Remote, images: list[Image.Image], alone: list[Answer]
) -> None:
    free = engine.call(calls.free_blocks)
    together, preempted = engine.call(calls.ask_noting_preemptions, mixed(images, 40))
    assert any(preempted), "a request that is reduced must have lost its blocks and got others"
    assert engine.call(calls.free_blocks) == free
    for answer, one in zip(together, alone, strict=True):
        assert answer.tokens == one.tokens
        torch.testing.assert_close(answer.logprobs, one.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("count", [16, pytest.param(40, marks=pytest.mark.long)])
def test_mixed_requests_with_caches_and_chunks_equal_each_alone(
    windowed: Remote, images: list[Image.Image], count: int
) -> None:
    """Twice, so that prompts are found; preempted requests find what they have lost, or compute it again."""
    asks = mixed(images, count)
    cold = [windowed.call(window_calls.ask, [one], True)[0] for one in asks]
    assert windowed.call(window_calls.reset)
    free = windowed.call(calls.free_blocks)
    num_found = 0
    for order in (1, -1):
        together, preempted = windowed.call(calls.ask_noting_preemptions, asks[::order], window_calls.ask)
        assert any(preempted)
        num_found += sum(answer.num_cached > 0 for answer in together)
        for answer, one in zip(together[::order], cold, strict=True):
            assert answer.tokens == one.tokens
            torch.testing.assert_close(answer.logprobs, one.logprobs, atol=TOLERANCE, rtol=0)
    assert num_found > 0
    # Preempted ones are few, so every one is aborted.
    for phase, every in (("decoding", 3), ("prefilled", 3), ("preempted", 1))[: 1 if count < 40 else 3]:
        aborted, answers = windowed.call(calls.abort_in, asks[: 12 if count < 40 else count], phase, every)
        assert aborted
        for index, tokens in answers.items():
            assert tokens == cold[index].tokens
        assert windowed.call(calls.free_blocks) == free
        assert not any(windowed.call(calls.held))


@pytest.mark.parametrize(
    ("phase", "every"), [("waiting", 3), ("prefilled", 3), ("decoding", 3), ("preempted", 1)]
)
def test_aborts_in_every_phase_give_everything_back(
    engine: Remote, images: list[Image.Image], alone: list[Answer], phase: str, every: int
) -> None:
    """Concurrent requests are not affected."""
    free = engine.call(calls.free_blocks)
    count = 40 if phase == "preempted" else 20
    aborted, answers = engine.call(calls.abort_in, mixed(images, count), phase, every)
    assert aborted
    assert len(answers) >= count // 2
    assert engine.call(calls.free_blocks) == free
    assert not any(engine.call(calls.held))
    for index, tokens in answers.items():
        assert tokens == alone[index].tokens


@pytest.mark.long
def test_400_requests_free_all_blocks(engine: Remote, images: list[Image.Image]) -> None:
    """`make soak-engine` sends 2,000."""
    free = engine.call(calls.free_blocks)
    batch = mixed(images, 10) + [Ask(TEXT_ONLY)] * 30
    assert engine.call(calls.repeat_short, batch, 10) == {free}
    assert not any(engine.call(calls.held))


@pytest.mark.parametrize(
    ("extra", "counts"),
    [
        # even over the layers 3 to 6: 128 removed in four steps of 32
        ({}, (144, 144, 144, 144, 112, 80, 48, 16)),
        ({"ficoco_keep": 9}, (144, 144, 144, 144, 110, 76, 42, 9)),
        ({"ficoco_method": "fastv", "ficoco_keep": 9}, (144, 144, 9, 9, 9, 9, 9, 9)),
        ({"ficoco_keep": 144}, (144,) * 8),
        ({"ficoco_method": "fitprune"}, (144, 144, 144, 144, 112, 80, 48, 16)),
        # by the same ratio after the layers 2, 4 and 6, and after 0, 1 and 3
        ({"ficoco_method": "pyramiddrop"}, (144, 144, 144, 69, 69, 33, 33, 16)),
        ({"ficoco_method": "sparsevlm"}, (144, 69, 33, 33, 16, 16, 16, 16)),
    ],
)
def test_slots_written_and_blocks_held_are_the_plans(
    engine: Remote,
    small_llava: Path,
    images: list[Image.Image],
    extra: dict[str, Any],
    counts: tuple[int, ...],
) -> None:
    """Counted in the cache itself, layer by layer, and planned by `ficoco-vllm plan`; with one image and with two."""
    method, keep = extra.get("ficoco_method", "ficoco-l"), str(extra.get("ficoco_keep", 16))
    for prompt, count in ((PROMPT, 1), (TWO_IMAGES, 2)):
        one = Ask(prompt, images[:count], num_tokens=5, extra=extra)
        written, blocks, num_tokens = engine.call(calls.written_slots, one)
        expected = [num_tokens + count * (left - 144) for left in counts]
        assert written == expected
        options = ("--method", method, "--keep", keep, "--images", str(count))
        assert kv_tokens(small_llava, num_tokens - count * 144, *options) == expected
        assert blocks == [-(-tokens // 32) for tokens in expected]


@pytest.mark.parametrize(("keep", "at_once"), [(144, 2), (9, 5)])
def test_what_a_request_no_longer_holds_lets_others_run(
    engine: Remote, images: list[Image.Image], keep: int, at_once: int
) -> None:
    """In the same cache; FastV, so that 9 of 144 tokens are left from the third of eight groups on."""
    extra = {"ficoco_method": "fastv", "ficoco_keep": keep}
    asks = [Ask(PROMPT, [image], num_tokens=3, extra=extra) for image in images]
    (answer,) = engine.call(calls.ask, asks[:1])
    counts = [144, 144, *[keep] * 6]
    blocks = [-(-(answer.num_prompt_tokens + 1 - 144 + count) // 32) for count in counts]
    assert engine.call(calls.most_running, asks) == (at_once, blocks)
    assert at_once == (BLOCKS - 1) // sum(blocks)
