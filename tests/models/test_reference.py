"""The served FiCoCo-V against Algorithm 1 written plainly on Hugging Face's model."""

from collections.abc import Iterator

import pytest
import torch
from PIL import Image
from vllm import LLM

from ficoco_vllm.tracing.chain import read_steps
from tests.reference import algorithm1
from tests.reference.algorithm1 import ReferenceLlava
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, ask, make_engine, request
from tests.support.oracle import Spy, assert_same_story

# float32 on both sides; the difference is the order of sums in matrix products and softmax, amplified by the layers.
TOLERANCE = 1e-4
# Of a log-probability's own size: trained weights give improbable tokens -20 and less, where float32 is that coarse.
RELATIVE = 1e-5
# The demo model's answers end after four tokens; what it says behind its end token amplifies rounding.
NUM_TOKENS = 4
BUDGETS = (576, 575, 192, 64, 9, 1)

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module", params=["random_llava", "demo_model"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[LLM, ReferenceLlava]]:
    """The engine and the oracle on the same weights."""
    folder = request.getfixturevalue(request.param)
    engine = make_engine(folder, {"method": "ficoco-v", "keep": 64, "explain": True})
    yield engine, ReferenceLlava(folder)
    engine.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("keep", BUDGETS)
def test_equals_reference(pair: tuple[LLM, ReferenceLlava], images: list[Image.Image], keep: int) -> None:
    engine, reference = pair
    image = images[keep % len(images)]
    (answer,) = ask(engine, [request(PROMPT, [image], ficoco_keep=keep)], NUM_TOKENS)
    tokens, logprobs = reference.generate(PROMPT, [(image, keep)], NUM_TOKENS)
    assert answer.tokens == tokens
    torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=RELATIVE)


def test_two_images_equal_reference(pair: tuple[LLM, ReferenceLlava], images: list[Image.Image]) -> None:
    engine, reference = pair
    (answer,) = ask(engine, [request(TWO_IMAGES, images[:2], ficoco_keep=100)], NUM_TOKENS)
    tokens, logprobs = reference.generate(TWO_IMAGES, [(image, 100) for image in images[:2]], NUM_TOKENS)
    assert answer.tokens == tokens
    torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=RELATIVE)


def test_batched_equals_alone(pair: tuple[LLM, ReferenceLlava], images: list[Image.Image]) -> None:
    """Eight images with three budgets, text between them, in one step, each against itself alone."""
    engine, _ = pair
    requests = []
    for index, image in enumerate(images):
        requests.append(request(PROMPT, [image], ficoco_keep=(64, 192, 9)[index % 3]))
        if index % 3 == 0:
            requests.append(request(TEXT_ONLY))
    engine.reset_prefix_cache()
    together = ask(engine, requests, NUM_TOKENS)
    for one, answer in zip(requests, together, strict=True):
        engine.reset_prefix_cache()
        engine.llm_engine.reset_mm_cache()
        (alone,) = ask(engine, [one], NUM_TOKENS)
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=RELATIVE)


def test_a_trace_tells_what_the_reference_does(
    pair: tuple[LLM, ReferenceLlava], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very request: beside it another one of the same budget is served without a trace."""
    engine, reference = pair
    spy = Spy(algorithm1.reduce_layer)
    monkeypatch.setattr(algorithm1, "reduce_layer", spy)
    reference.features(images[2], 64)
    requests = [
        request(PROMPT, [images[3]], ficoco_keep=64),
        request(PROMPT, [images[2]], ficoco_keep=64, ficoco_trace=11),
        request(PROMPT, [images[2]], ficoco_keep=64),
    ]
    _, traced, plain = ask(engine, requests, NUM_TOKENS)
    torch.testing.assert_close(traced.logprobs, plain.logprobs, atol=TOLERANCE, rtol=RELATIVE)
    (trace,) = engine.collective_rpc("ficoco_take_trace", args=(11,))
    # Shares are ratios of attention weights, which differ as the log-probabilities do.
    assert_same_story(read_steps(trace, 576), spy.mixes, 576, TOLERANCE)
    assert engine.collective_rpc("ficoco_take_trace", args=(11,)) == [[]]


def test_the_check_can_fail(pair: tuple[LLM, ReferenceLlava], images: list[Image.Image]) -> None:
    """Negative control: one token more is told apart by far more than the tolerance."""
    engine, reference = pair
    (answer,) = ask(engine, [request(PROMPT, [images[0]], ficoco_keep=64)], num_tokens=1)
    _, logprobs = reference.generate(PROMPT, [(images[0], 65)], 1)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE
