"""LLaVA-NeXT's images, of any number of tokens, reduced in the decoder: against Algorithm 2 written plainly."""

import math
from pathlib import Path

import pytest
from PIL import Image

from tests.decoder.calls import Ask, ask, refusal, written_slots
from tests.decoder.test_reference import left
from tests.reference.algorithm2 import Shown
from tests.reference.tiles import TiledDecoder
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.pictures import noise
from tests.support.planned import kv_tokens
from tests.support.random_llava import build_next
from tests.support.remote import Host, Remote

pytestmark = [pytest.mark.compat, pytest.mark.engine]

# Width and height, tiles are 48 pixels wide: four tiles, three with padding, two with padding in both, an image that is
# smaller than a patch of them and a sliver.
SIZES = [(96, 96), (200, 30), (50, 97), (10, 10), (700, 3)]
PATCHES = 36  # of a tile


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, up to 192 visual tokens an image, eight decoder layers."""
    return build_next(tmp_path_factory.mktemp("small-next"), tile_size=48, decoder_layers=8)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=2)


@pytest.fixture(scope="module")
def reference(model: Path) -> TiledDecoder:
    """The float64 oracle on the same weights."""
    return TiledDecoder(model)


@pytest.fixture(scope="module")
def engine(host: Host, model: Path) -> Remote:
    """FiCoCo-L with the default budget: a ninth of an image's tokens."""
    return host.get(model, {"method": "ficoco-l"}, block_size=32)


def check(
    reference: TiledDecoder, answers: list[Answer], asks: list[Ask], method: str, keep: int | None
) -> None:
    """Hold answers against the oracle; `keep` None is the default."""
    for one, answer in zip(asks, answers, strict=True):
        shown = []
        for image in one.images:
            entering = len(reference.features(image, PATCHES))
            kept = min(entering, round(entering / 9) if keep is None else keep)
            shown.append(Shown(image, PATCHES, left(method, entering, kept)))
        logprobs = reference.judge(method, one.prompt, shown, answer.tokens)
        greedy = logprobs.argmax(dim=-1).tolist()
        assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, ends=False)


@pytest.mark.proves(family="LLaVA-NeXT", site="decoder", decoder="Llama")
@pytest.mark.parametrize("keep", [None, 20, 120])
def test_equals_reference(
    engine: Remote, reference: TiledDecoder, pictures: list[Image.Image], keep: int | None
) -> None:
    """In one step; 120 tokens are more than the smaller images have, which keep all."""
    extra = {} if keep is None else {"ficoco_keep": keep}
    asks = [Ask(PROMPT, [image], NUM_TOKENS, extra) for image in pictures]
    asks += [Ask(TWO_IMAGES, pictures[:2], NUM_TOKENS, extra), Ask(TEXT_ONLY, [], NUM_TOKENS)]
    check(reference, engine.call(ask, asks), asks, "ficoco-l", keep)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop"])
def test_other_methods_equal_reference(
    engine: Remote, reference: TiledDecoder, pictures: list[Image.Image], method: str
) -> None:
    extra = {"ficoco_keep": 20, "ficoco_method": method}
    asks = [Ask(PROMPT, [image], NUM_TOKENS, extra) for image in pictures]
    check(reference, engine.call(ask, asks), asks, method, 20)


def test_the_check_can_fail(engine: Remote, reference: TiledDecoder, pictures: list[Image.Image]) -> None:
    """Negative control: one token more in the end is noticed."""
    (answer,) = engine.call(ask, [Ask(PROMPT, pictures[:1], 1, {"ficoco_keep": 20})])
    entering = len(reference.features(pictures[0], PATCHES))
    shown = Shown(pictures[0], PATCHES, left("ficoco-l", entering, 21))
    logprobs = reference.judge("ficoco-l", PROMPT, [shown], answer.tokens)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


def test_any_image_may_name_the_budget_of_the_largest(engine: Remote, pictures: list[Image.Image]) -> None:
    largest = 5 * PATCHES + 12  # four tiles, and a newline after each of their 12 rows of patches
    assert engine.call(refusal, Ask(PROMPT, [pictures[2]], 1, {"ficoco_keep": largest})) == ""
    message = engine.call(refusal, Ask(PROMPT, [pictures[2]], 1, {"ficoco_keep": largest + 1}))
    assert f"an integer from 1 to {largest}" in message


@pytest.mark.proves(family="LLaVA-NeXT", site="both", decoder="Llama")
def test_tower_then_decoder(
    host: Host, model: Path, reference: TiledDecoder, pictures: list[Image.Image]
) -> None:
    """FiCoCo-VL: each tile down to the geometric mean of its patches and the budget, then the image down to that."""
    tile_keep = math.isqrt(PATCHES * 16)
    asks = [Ask(PROMPT, [image], NUM_TOKENS) for image in pictures]
    asks.append(Ask(TWO_IMAGES, pictures[:2], NUM_TOKENS))
    engine = host.get(model, {"method": "ficoco-vl", "keep": 16}, block_size=32)
    answers = engine.call(ask, asks)
    held = [engine.call(written_slots, one) for one in asks[:-1]]
    for one, (_, blocks, num_tokens) in zip(asks, held, strict=False):
        (image,) = one.images
        num_text_tokens = num_tokens - len(reference.features(image, tile_keep))
        size = ("--image-size", f"{image.width}x{image.height}")
        planned = kv_tokens(model, num_text_tokens, "--method", "ficoco-vl", "--keep", "16", *size)
        per_segment = planned[:: len(planned) // len(blocks)]
        assert blocks == [-(-tokens // 32) for tokens in per_segment]
    for one, answer in zip(asks, answers, strict=True):
        shown = []
        for image in one.images:
            entering = len(reference.features(image, tile_keep))
            shown.append(Shown(image, tile_keep, left("ficoco-l", entering, 16)))
        logprobs = reference.judge("ficoco-l", one.prompt, shown, answer.tokens)
        greedy = logprobs.argmax(dim=-1).tolist()
        assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, ends=False)
