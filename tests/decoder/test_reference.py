"""The served decoder against Algorithm 2 written plainly on Hugging Face's model."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from ficoco_vllm.demo_model import examples
from ficoco_vllm.tracing.chain import read_steps
from tests.decoder.calls import Ask, ask, take_trace
from tests.reference.algorithm2 import RULES, ReferenceDecoder, Shown
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.oracle import Spy, assert_same_story
from tests.support.remote import Remote, remote_engine

# float32 on both sides; the difference is the order of sums in matrix products and softmax, amplified by the layers.
TOLERANCE = 1e-4
# Of a log-probability's own size: trained weights give improbable tokens -8 and less, where float32 is that coarse.
RELATIVE = 1e-5
# The answer; behind its end a trained model is led by rounding.
NUM_TOKENS = 2
# Of eight decoder layers in segments of one: FiCoCo-L from the 4th on; FastV behind the 2nd; PyramidDrop's layers
# 8, 16 and 24 of 32. The last layer saves nothing.
LAYERS = {"ficoco-l": (3, 4, 5, 6), "fitprune": (3, 4, 5, 6), "fastv": (1,), "pyramiddrop": (2, 4, 6)}

pytestmark = pytest.mark.engine


def left(method: str, entering: int, keep: int) -> dict[int, int]:
    """Tokens left behind each reducing layer, spread as the method's authors do."""
    layers = LAYERS[method]
    steps = len(layers)
    if method == "pyramiddrop":
        counts = [round(entering * (keep / entering) ** (step / steps)) for step in range(1, steps)] + [keep]
    else:
        lost = [(entering - keep) // steps + (index < (entering - keep) % steps) for index in range(steps)]
        counts = [entering - sum(lost[: index + 1]) for index in range(steps)]
    return dict(zip(layers, counts, strict=True))


@pytest.fixture(scope="module", params=["small_llava", "demo_model"])
def model(request: pytest.FixtureRequest) -> Path:
    """Random weights with 144 visual tokens, and trained ones with 576; both have eight decoder layers."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture
def pictures(model: Path, images: list[Image.Image]) -> list[Image.Image]:
    """What the model can tell apart: anything for random weights, for trained ones what they know."""
    if model.name != "demo_model":
        return images
    shown = [Image.open(example.image).convert("RGB") for example in examples()]
    return [shown[index % len(shown)] for index in range(8)]


@pytest.fixture(scope="module")
def pair(model: Path) -> Iterator[tuple[Remote, ReferenceDecoder]]:
    """The engine and the oracle on the same weights."""
    with remote_engine(model, {"method": "ficoco-l", "keep": 16, "explain": True}, block_size=32) as engine:
        yield engine, ReferenceDecoder(model)


@pytest.mark.parametrize("method", list(LAYERS))
def test_equals_reference(
    pair: tuple[Remote, ReferenceDecoder], images: list[Image.Image], method: str
) -> None:
    engine, reference = pair
    num_patches = reference.num_patches
    keeps = (num_patches, num_patches // 2, 64, 9)
    asks = [
        Ask(PROMPT, [images[index]], NUM_TOKENS, extra={"ficoco_method": method, "ficoco_keep": keep})
        for index, keep in enumerate(keeps)
    ]
    answers = engine.call(ask, asks)
    for one, answer, keep in zip(asks, answers, keeps, strict=True):
        shown = Shown(one.images[0], num_patches, left(method, num_patches, keep))
        tokens, logprobs = reference.answer(method, PROMPT, [shown], one.num_tokens)
        assert answer.tokens == tokens
        torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=RELATIVE)


def test_two_images_and_text_in_one_step(
    pair: tuple[Remote, ReferenceDecoder], images: list[Image.Image]
) -> None:
    """Each image has the whole budget; a request without any is left alone."""
    engine, reference = pair
    num_patches = reference.num_patches
    asks = [
        Ask(TWO_IMAGES, images[:2], NUM_TOKENS),
        Ask(TEXT_ONLY, [], NUM_TOKENS),
        Ask(PROMPT, [images[3]], num_tokens=2),
    ]
    answers = engine.call(ask, asks)
    for one, answer in zip(asks, answers, strict=True):
        shown = [Shown(image, num_patches, left("ficoco-l", num_patches, 16)) for image in one.images]
        tokens, logprobs = reference.answer("ficoco-l", one.prompt, shown, one.num_tokens)
        assert answer.tokens == tokens
        torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=RELATIVE)


def test_a_trace_tells_what_the_reference_does(
    pair: tuple[Remote, ReferenceDecoder], images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the very request, not of its neighbours in the step."""
    engine, reference = pair
    spy = Spy(RULES["ficoco-l"])
    monkeypatch.setitem(RULES, "ficoco-l", spy)
    num_patches = reference.num_patches
    reference.answer(
        "ficoco-l", PROMPT, [Shown(images[4], num_patches, left("ficoco-l", num_patches, 16))], num_tokens=1
    )
    asks = [
        Ask(PROMPT, [images[5]], NUM_TOKENS),
        Ask(TEXT_ONLY, [], NUM_TOKENS),
        Ask(PROMPT, [images[4]], NUM_TOKENS, extra={"ficoco_trace": 12}),
    ]
    engine.call(ask, asks)
    steps = read_steps(engine.call(take_trace, 12), num_patches)
    assert [step.layer for step in steps] == list(LAYERS["ficoco-l"])
    # Shares are ratios of attention weights, which differ as the log-probabilities do.
    assert_same_story(steps, spy.mixes, num_patches, TOLERANCE)


def test_the_check_can_fail(pair: tuple[Remote, ReferenceDecoder], pictures: list[Image.Image]) -> None:
    """Negative control: what is left without any reduction is told apart by far more than the tolerance."""
    engine, reference = pair
    (answer,) = engine.call(ask, [Ask(PROMPT, [pictures[0]], NUM_TOKENS)])
    shown = Shown(pictures[0], reference.num_patches, {})
    _, logprobs = reference.answer("ficoco-l", PROMPT, [shown], NUM_TOKENS)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


def test_tower_then_decoder(small_llava: Path, images: list[Image.Image]) -> None:
    """FiCoCo-VL: Algorithm 1 down to the geometric mean, then Algorithm 2; random weights only."""
    reference = ReferenceDecoder(small_llava)
    between = math.isqrt(reference.num_patches * 16)
    asks = [
        Ask(PROMPT, [images[4]], NUM_TOKENS),
        Ask(PROMPT, [images[5]], NUM_TOKENS, mm={"ficoco_keep": 100}, extra={"ficoco_keep": 9}),
    ]
    with remote_engine(small_llava, {"method": "ficoco-vl", "keep": 16}, block_size=32) as engine:
        answers = engine.call(ask, asks)
    for one, answer, (entering, keep) in zip(asks, answers, [(between, 16), (100, 9)], strict=True):
        shown = Shown(one.images[0], entering, left("ficoco-l", entering, keep))
        tokens, logprobs = reference.answer("ficoco-vl", PROMPT, [shown], one.num_tokens)
        assert answer.tokens == tokens
        torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=RELATIVE)
