"""The saving is real: blocks held for a request are what its shorter prompt predicts, and all come back."""

import math
from pathlib import Path

import pytest
from PIL import Image
from vllm import LLM, SamplingParams

from tests.support.engine import PROMPT, Engines, ask, request, scheduler_of
from tests.support.planned import kv_tokens

pytestmark = [pytest.mark.compat, pytest.mark.engine]

BLOCK_SIZE = 32


@pytest.fixture(scope="module")
def engine(engines: Engines, random_llava: Path) -> LLM:
    return engines.get(random_llava, {"method": "ficoco-v", "keep": 64}, block_size=BLOCK_SIZE)


@pytest.mark.parametrize("keep", [576, 192, 64, 1])
def test_blocks_follow_the_prompt(
    engine: LLM, random_llava: Path, images: list[Image.Image], keep: int
) -> None:
    """Blocks after the prefill of one image, as `ficoco-vllm plan` has them, and after the request has ended."""
    scheduler = scheduler_of(engine)
    pool = scheduler.kv_cache_manager.block_pool
    engine.reset_prefix_cache()
    free = pool.get_num_free_blocks()
    steps = engine.llm_engine
    (request_id,) = engine.enqueue(
        [request(PROMPT, [images[0]], ficoco_keep=keep)],
        SamplingParams(temperature=0, max_tokens=4, ignore_eos=True),
        use_tqdm=False,
    )
    steps.step()  # the prefill, and the first token
    (held,) = scheduler.requests.values()
    text_tokens = len(engine.get_tokenizer()(PROMPT, add_special_tokens=False).input_ids) - 1
    num_tokens = text_tokens + keep
    assert held.num_prompt_tokens == num_tokens
    assert set(kv_tokens(random_llava, text_tokens, "--keep", str(keep))) == {num_tokens}
    assert free - pool.get_num_free_blocks() == math.ceil(num_tokens / BLOCK_SIZE)
    while steps.has_unfinished_requests():
        steps.step()
    assert request_id
    assert pool.get_num_free_blocks() == free


def test_a_step_encodes_as_many_images_as_in_stock(engine: LLM) -> None:
    """The budget counts emitted tokens; it shrinks with them, but any budget that a request may ask for still fits."""
    assert scheduler_of(engine).max_num_encoder_input_tokens == max(576, 2048 * 64 // 576)


def test_sixteen_images_at_once_with_the_smallest_budget(engine: LLM, images: list[Image.Image]) -> None:
    """More than the tower takes in one go: all are answered, as alone."""
    engine.reset_prefix_cache()
    engine.llm_engine.reset_mm_cache()
    together = ask(engine, [request(PROMPT, [image], ficoco_keep=1) for image in images * 2], 2)
    assert [answer.tokens for answer in together[:8]] == [answer.tokens for answer in together[8:]]
    assert {answer.num_prompt_tokens for answer in together} == {together[0].num_prompt_tokens}
