"""The served FiCoCo-V against Algorithm 1 written plainly on Hugging Face's model, in float64."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.tracing.chain import read_steps
from tests.models.checks import assert_together_equals_alone
from tests.models.conftest import Pair
from tests.reference import algorithm1
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal, demo_questions
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, ask, request
from tests.support.hugging_face import HfLlava
from tests.support.oracle import Spy, assert_same_story

BUDGETS = (576, 575, 192, 64, 9, 1)

pytestmark = [pytest.mark.compat, pytest.mark.engine]


@pytest.fixture(params=["random", "demo"])
def weights(request: pytest.FixtureRequest) -> str:
    """Kind of the served model's weights."""
    return str(request.param)


@pytest.fixture
def pair(request: pytest.FixtureRequest, weights: str) -> Pair:
    """The engine and the oracle on the same weights."""
    result: Pair = request.getfixturevalue(f"{weights}_pair")
    return result


@pytest.fixture
def questions(weights: str, images: list[Image.Image]) -> list[tuple[str, Image.Image]]:
    """Noise for random weights; for trained ones known images (for noise see test_precision.py)."""
    return demo_questions() if weights == "demo" else [(PROMPT, image) for image in images[:6]]


@pytest.mark.proves(family="LLaVA-1.5", site="tower")
@pytest.mark.parametrize("keep", BUDGETS)
def test_equals_reference(
    pair: Pair, weights: str, questions: list[tuple[str, Image.Image]], keep: int
) -> None:
    engine, reference = pair
    answers = ask(engine, [request(text, [image], ficoco_keep=keep) for text, image in questions], NUM_TOKENS)
    for (text, image), answer in zip(questions, answers, strict=True):
        tokens, logprobs = reference.generate(text, [(image, keep)], NUM_TOKENS)
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=weights == "demo")


def test_two_images_equal_reference(
    pair: Pair, weights: str, questions: list[tuple[str, Image.Image]]
) -> None:
    engine, reference = pair
    pictures = [image for _, image in questions[2:4]]
    (answer,) = ask(engine, [request(TWO_IMAGES, pictures, ficoco_keep=100)], NUM_TOKENS)
    tokens, logprobs = reference.generate(TWO_IMAGES, [(image, 100) for image in pictures], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=weights == "demo")


def test_batched_equals_alone(pair: Pair, weights: str, questions: list[tuple[str, Image.Image]]) -> None:
    """Eight images with three budgets, text between them, in one step, each against itself alone."""
    engine, _ = pair
    requests = []
    for index, (text, image) in enumerate(questions + questions[:2]):
        requests.append(request(text, [image], ficoco_keep=(64, 192, 9)[index % 3]))
        if index % 3 == 0:
            requests.append(request(TEXT_ONLY))
    assert_together_equals_alone(engine, requests, ends=weights == "demo")


def test_a_trace_matches_the_reference(
    pair: Pair, questions: list[tuple[str, Image.Image]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trace belongs to its request: another one with the same budget runs in the same step without a trace."""
    engine, reference = pair
    (text, image), (other_text, other) = questions[2], questions[3]
    spy = Spy(algorithm1.reduce_layer)
    monkeypatch.setattr(algorithm1, "reduce_layer", spy)
    reference.features(image, 64)
    requests = [
        request(other_text, [other], ficoco_keep=64),
        request(text, [image], ficoco_keep=64, ficoco_trace=11),
        request(text, [image], ficoco_keep=64),
    ]
    _, traced, plain = ask(engine, requests, NUM_TOKENS)
    torch.testing.assert_close(traced.logprobs, plain.logprobs, atol=TOLERANCE, rtol=0)
    (trace,) = engine.collective_rpc("ficoco_take_trace", args=(11,))
    # Shares are ratios of attention weights, which differ as the log-probabilities do.
    assert_same_story(read_steps(trace, [576]), spy.mixes, 576, TOLERANCE)
    assert engine.collective_rpc("ficoco_take_trace", args=(11,)) == [[]]


def test_equals_hugging_face(
    pair: Pair, weights: str, questions: list[tuple[str, Image.Image]], random_llava: Path, demo_model: Path
) -> None:
    """Transformers with the same reduction, in one batch: same kept patches, same answers."""
    engine, _ = pair
    hf = HfLlava(demo_model if weights == "demo" else random_llava)
    questions = questions[:3]
    pictures = [image for _, image in questions[:2]]
    requests = [
        request(text, [image], ficoco_keep=64, ficoco_trace=21 + number)
        for number, (text, image) in enumerate(questions)
    ]
    served = ask(
        engine, [*requests, request(TWO_IMAGES, pictures, ficoco_keep=64), request(TEXT_ONLY)], NUM_TOKENS
    )
    with reduce_tokens(hf.model, "ficoco-v", 64) as reduction:
        prompts = [*((text, [image]) for text, image in questions), (TWO_IMAGES, pictures), (TEXT_ONLY, [])]
        answers = hf.ask(prompts, NUM_TOKENS)
    for answer, (tokens, logprobs) in zip(served, answers, strict=True):
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=weights == "demo")
    for number, kept in enumerate(reduction.kept[: len(questions)]):
        (trace,) = engine.collective_rpc("ficoco_take_trace", args=(21 + number,))
        assert list(read_steps(trace, [576])[-1].kept) == kept.tolist()


def test_the_check_can_fail(pair: Pair, questions: list[tuple[str, Image.Image]]) -> None:
    """Negative control: one more token changes the answer by far more than the tolerance."""
    engine, reference = pair
    text, image = questions[0]
    (answer,) = ask(engine, [request(text, [image], ficoco_keep=64)], num_tokens=1)
    _, logprobs = reference.generate(text, [(image, 65)], 1)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE
