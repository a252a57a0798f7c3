"""The served decoder against Algorithm 2 and its relatives written plainly on Hugging Face's model, in float64."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.tracing.chain import read_steps
from tests.decoder.calls import Ask, ask, take_trace
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.reference.decoder_rules import RULES
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal, demo_questions
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.hugging_face import HfLlava
from tests.support.oracle import Spy, assert_same_story
from tests.support.remote import Host, Remote

# Eight decoder layers in segments of one: FiCoCo-L from the 4th on; FastV after the 2nd; PyramidDrop's layers
# 8, 16 and 24 of 32; SparseVLM's 2, 6 and 15 of 32, scaled to eight. The last layer saves nothing.
LAYERS = {
    "ficoco-l": (3, 4, 5, 6),
    "fitprune": (3, 4, 5, 6),
    "fastv": (1,),
    "pyramiddrop": (2, 4, 6),
    "sparsevlm": (0, 1, 3),
}
# In segments of two layers a method reduces in the last layer of a segment.
LAYERS_OF_TWO = {
    "ficoco-l": (3, 5),
    "fitprune": (3, 5),
    "fastv": (1,),
    "pyramiddrop": (1, 3, 5),
    "sparsevlm": (1, 3),
}
GEOMETRIC = ("pyramiddrop", "sparsevlm")
# So many tokens that a block of 32 slots is filled while they are written.
LONG_ANSWER = 40

pytestmark = [pytest.mark.compat, pytest.mark.engine]


def left(
    method: str, entering: int, keep: int, layers_of: Mapping[str, tuple[int, ...]] = LAYERS
) -> dict[int, int]:
    """Tokens left after each reducing layer, spread as the method's authors do."""
    layers = layers_of[method]
    steps = len(layers)
    if method in GEOMETRIC:
        counts = [round(entering * (keep / entering) ** (step / steps)) for step in range(1, steps)] + [keep]
    else:
        lost = [(entering - keep) // steps + (index < (entering - keep) % steps) for index in range(steps)]
        counts = [entering - sum(lost[: index + 1]) for index in range(steps)]
    return dict(zip(layers, counts, strict=True))


@pytest.fixture(scope="module", params=["small_llava", pytest.param("demo_model", marks=pytest.mark.long)])
def model(request: pytest.FixtureRequest) -> Path:
    """Random weights with 144 visual tokens, and trained ones with 576; both have eight decoder layers."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path) -> bool:
    """Whether the weights know when an answer ends."""
    return model.name == "demo_model"


@pytest.fixture
def questions(trained: bool, images: list[Image.Image]) -> list[tuple[str, Image.Image]]:
    """Noise for random weights; for trained ones known images, the longest answers first."""
    known = demo_questions()
    return known[2:] + known[:2] if trained else [(PROMPT, image) for image in images[:6]]


@pytest.fixture(scope="module")
def pair(host: Host, model: Path) -> tuple[Remote, ReferenceDecoder]:
    """The engine and the oracle on the same weights."""
    settings = {"method": "ficoco-l", "keep": 16, "explain": True}
    return host.get(model, settings, block_size=32), ReferenceDecoder(model)


def check(
    reference: ReferenceDecoder, method: str, one: Ask, answer: Answer, shown: list[Shown], trained: bool
) -> None:
    """Hold one answer against the oracle."""
    logprobs = reference.judge(method, one.prompt, shown, answer.tokens)

    def in_float32() -> Tensor:
        rounded = type(reference)(Path(reference.config.name_or_path), torch.float32)
        return rounded.judge(method, one.prompt, shown, answer.tokens)

    greedy = logprobs.argmax(dim=-1).tolist()
    assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, trained, in_float32 if trained else None)


@pytest.mark.proves(family="LLaVA-1.5", site="decoder", decoder="Llama")
@pytest.mark.parametrize("method", list(LAYERS))
def test_equals_reference(
    pair: tuple[Remote, ReferenceDecoder],
    questions: list[tuple[str, Image.Image]],
    method: str,
    trained: bool,
) -> None:
    """Budgets: all, half, 64 and 9; with each of them two images."""
    engine, reference = pair
    num_patches = reference.num_patches
    asks, keeps = [], []
    for index, keep in enumerate((num_patches, num_patches // 2, 64, 9)):
        # The first two are the longest answers; the small budgets, where most is reduced, get them.
        for text, image in questions[:2] if keep in (64, 9) else questions[2 + index : 4 + index]:
            extra = {"ficoco_method": method, "ficoco_keep": keep}
            asks.append(Ask(text, [image], NUM_TOKENS, extra))
            keeps.append(keep)
    for one, answer, keep in zip(asks, engine.call(ask, asks), keeps, strict=True):
        shown = Shown(one.images[0], num_patches, left(method, num_patches, keep))
        check(reference, method, one, answer, [shown], trained)


@pytest.mark.parametrize("method", list(LAYERS))
def test_equals_hugging_face(
    pair: tuple[Remote, ReferenceDecoder],
    model: Path,
    questions: list[tuple[str, Image.Image]],
    method: str,
    trained: bool,
) -> None:
    """Transformers with the same reduction, in one batch with a prompt of two images and one without."""
    engine, reference = pair
    prompts = [(text, [image]) for text, image in questions[:2]]
    prompts += [(TWO_IMAGES, [image for _, image in questions[:2]]), (TEXT_ONLY, [])]
    extra = {"ficoco_method": method, "ficoco_keep": 16}
    asks = [Ask(text, images, NUM_TOKENS, extra if images else {}) for text, images in prompts]
    hf = HfLlava(model)
    with reduce_tokens(hf.model, method, 16):
        answers = hf.ask(prompts, NUM_TOKENS)
    num_patches = reference.num_patches
    for one, answer, (tokens, logprobs) in zip(asks, engine.call(ask, asks), answers, strict=True):
        if trained:  # magnifies rounding, so each of the two is held against the oracle
            shown = [Shown(image, num_patches, left(method, num_patches, 16)) for image in one.images]
            check(reference, method, one, Answer(tokens, 0, logprobs), shown, trained)
            check(reference, method, one, answer, shown, trained)
        else:
            assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, trained)


def test_segments_of_two_layers(host: Host, small_llava: Path, images: list[Image.Image]) -> None:
    """A residual stream that goes on within a segment, two layers in each group of the cache, and a long answer."""
    reference = ReferenceDecoder(small_llava)
    num_patches = reference.num_patches
    asks = [
        Ask(
            PROMPT,
            [images[index % len(images)]],
            LONG_ANSWER if method == "ficoco-l" else NUM_TOKENS,
            {"ficoco_method": method, "ficoco_keep": keep},
        )
        for index, (method, keep) in enumerate(product(LAYERS_OF_TWO, (64, 9)))
    ]
    settings = {"method": "ficoco-l", "keep": 16, "num_segments": 4}
    answers = host.get(small_llava, settings, block_size=32).call(ask, asks)
    for one, answer in zip(asks, answers, strict=True):
        method, keep = one.extra["ficoco_method"], one.extra["ficoco_keep"]
        shown = Shown(one.images[0], num_patches, left(method, num_patches, keep, LAYERS_OF_TWO))
        check(reference, method, one, answer, [shown], trained=False)


def test_two_images_and_text_in_one_step(
    pair: tuple[Remote, ReferenceDecoder], questions: list[tuple[str, Image.Image]], trained: bool
) -> None:
    """Each image has the whole budget; a request without any is left alone."""
    engine, reference = pair
    num_patches = reference.num_patches
    pictures = [image for _, image in questions]
    asks = [
        Ask(TWO_IMAGES, pictures[:2], NUM_TOKENS),
        Ask(TEXT_ONLY, [], NUM_TOKENS),
        Ask(questions[0][0], [pictures[0]], num_tokens=2),
    ]
    answers = engine.call(ask, asks)
    for one, answer in zip(asks, answers, strict=True):
        shown = [Shown(image, num_patches, left("ficoco-l", num_patches, 16)) for image in one.images]
        check(reference, "ficoco-l", one, answer, shown, trained)


def test_a_trace_matches_the_reference(
    pair: tuple[Remote, ReferenceDecoder],
    questions: list[tuple[str, Image.Image]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A trace belongs to its request, not to its neighbours in the step."""
    engine, reference = pair
    rule = RULES["ficoco-l"]
    spy = Spy(lambda tokens, seen, removed: rule(replace(seen, tokens=tokens), removed))
    monkeypatch.setitem(RULES, "ficoco-l", lambda seen, removed: spy(seen.tokens, seen, removed))
    num_patches = reference.num_patches
    (text, image), (other_text, other_image) = questions[0], questions[1]
    asks = [
        Ask(other_text, [other_image], NUM_TOKENS),
        Ask(TEXT_ONLY, [], NUM_TOKENS),
        Ask(text, [image], NUM_TOKENS, extra={"ficoco_trace": 12}),
    ]
    answers = engine.call(ask, asks)
    shown = Shown(image, num_patches, left("ficoco-l", num_patches, 16))
    reference.judge("ficoco-l", text, [shown], answers[2].tokens)
    steps = read_steps(engine.call(take_trace, 12), [num_patches])
    assert [step.layer for step in steps] == list(LAYERS["ficoco-l"])
    # Shares are ratios of attention weights, which differ as the log-probabilities do.
    assert_same_story(steps, spy.mixes, num_patches, TOLERANCE)


@pytest.mark.parametrize("method", list(LAYERS))
def test_the_check_can_fail(
    pair: tuple[Remote, ReferenceDecoder], questions: list[tuple[str, Image.Image]], method: str
) -> None:
    """Negative control: one token more in the end differs by far more than the tolerance."""
    engine, reference = pair
    text, image = questions[0]
    (answer,) = engine.call(
        ask, [Ask(text, [image], NUM_TOKENS, {"ficoco_method": method, "ficoco_keep": 16})]
    )
    num_patches = reference.num_patches
    shown = Shown(image, num_patches, left(method, num_patches, 17))
    logprobs = reference.judge(method, text, [shown], answer.tokens)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


@pytest.mark.proves(family="LLaVA-1.5", site="both", decoder="Llama")
def test_tower_then_decoder(
    host: Host, model: Path, questions: list[tuple[str, Image.Image]], trained: bool
) -> None:
    """FiCoCo-VL: Algorithm 1 down to the geometric mean, then Algorithm 2."""
    reference = ReferenceDecoder(model)
    num_patches = reference.num_patches
    budgets = []  # tokens that enter the decoder, tokens that are left
    asks = []
    for index, keep in enumerate((num_patches, num_patches // 2, 64, 9)):
        text, image = questions[index]
        # The tower's part is the server's, with budget 16, unless the request names another.
        entering = math.isqrt(num_patches * 16) if keep == 9 else math.isqrt(num_patches * keep)
        asks.append(
            Ask(
                text,
                [image],
                NUM_TOKENS,
                extra={"ficoco_keep": keep},
                mm={} if keep == 9 else {"ficoco_keep": entering},
            )
        )
        budgets.append((entering, keep))
    answers = host.get(model, {"method": "ficoco-vl", "keep": 16}, block_size=32).call(ask, asks)
    for one, answer, (entering, keep) in zip(asks, answers, budgets, strict=True):
        shown = Shown(one.images[0], entering, left("ficoco-l", entering, keep))
        check(reference, "ficoco-vl", one, answer, [shown], trained)
