"""Language models other than Llama, reduced in tower and decoder: against the oracle on Hugging Face's, in float64.

One engine each. It runs FiCoCo-VL; requests that keep all patches in the tower name the decoder's method alone.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.planning.server import ServerPlan
from tests.decoder.calls import Ask, ask, written_slots
from tests.decoder.test_reference import left
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.reference.tiles import TiledDecoder
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.hugging_face import HfLlava
from tests.support.pictures import noise
from tests.support.random_llava import build, build_next
from tests.support.remote import Host, Remote

pytestmark = [pytest.mark.compat, pytest.mark.engine]

BLOCK_SIZE = 32
# Width and height; for LLaVA-NeXT, whose tiles are 48 pixels wide: four tiles, three with padding, two with padding in
# both, and a sliver.
SIZES = [(96, 96), (200, 30), (50, 97), (700, 3)]
METHODS = ("ficoco-l", "fastv", "pyramiddrop", "sparsevlm")


@dataclass
class Case:
    """One language model in a LLaVA or, for Mistral as published, a LLaVA-NeXT.

    Attributes:
        engine: runs FiCoCo-VL down to 16 tokens.
        reference: oracle on the same weights.
        folder: of the model.
        num_patches: of an image, or of a tile.
    """

    engine: Remote
    reference: ReferenceDecoder
    folder: Path
    num_patches: int

    def shown(self, image: Image.Image, method: str, keep: int) -> Shown:
        """An image as a prompt holds it; `method` ficoco-vl reduces in the tower as well."""
        tower_keep = math.isqrt(self.num_patches * 16) if method == "ficoco-vl" else self.num_patches
        entering = len(self.reference.features(image, tower_keep))
        decoder_method = "ficoco-l" if method == "ficoco-vl" else method
        return Shown(image, tower_keep, left(decoder_method, entering, min(keep, entering)))

    def one(self, prompt: str, images: list[Image.Image], method: str, keep: int, **more: Any) -> Ask:
        """A request."""
        extra = {"ficoco_method": "ficoco-l" if method == "ficoco-vl" else method, "ficoco_keep": keep}
        mm = {} if method == "ficoco-vl" else {"ficoco_keep": self.num_patches}
        return Ask(prompt, images, NUM_TOKENS, extra if images else {}, mm if images else {}, **more)

    def check(self, one: Ask, answer: Answer, method: str, keep: int) -> None:
        """Hold one answer against the oracle."""
        shown = [self.shown(image, method, keep) for image in one.images]
        logprobs = self.reference.judge(method, one.prompt, shown, answer.tokens)
        greedy = logprobs.argmax(dim=-1).tolist()
        assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, ends=False)


@pytest.fixture(scope="module", params=["mistral", "qwen2", "qwen3"])
def case(request: pytest.FixtureRequest, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random weights, eight decoder layers."""
    decoder = request.param
    folder = tmp_path_factory.mktemp(decoder)
    if decoder == "mistral":
        build_next(folder, tile_size=48, decoder_layers=8, decoder=decoder)
        reference: ReferenceDecoder = TiledDecoder(folder)
    else:
        build(folder, patch_size=16, decoder_layers=8, decoder=decoder)
        reference = ReferenceDecoder(folder)
    engine = host.get(folder, {"method": "ficoco-vl", "keep": 16, "windows": "off"}, block_size=BLOCK_SIZE)
    return Case(engine, reference, folder, reference.num_patches)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=3)


@pytest.mark.parametrize("method", [*METHODS, "ficoco-vl"])
def test_equals_reference(case: Case, pictures: list[Image.Image], method: str) -> None:
    """In one step: several budgets, two images, and a prompt without any."""
    keeps = [40, 9, 20, 20, 33]  # FiCoCo-VL takes up to 48, the tokens that enter the decoder
    prompts = [
        (PROMPT, pictures[:1]),
        (PROMPT, pictures[1:2]),
        (TWO_IMAGES, pictures[1:3]),
        (TEXT_ONLY, []),
        (PROMPT, pictures[3:]),
    ]
    asks = [case.one(*prompt, method, keep) for prompt, keep in zip(prompts, keeps, strict=True)]
    for one, answer, keep in zip(asks, case.engine.call(ask, asks), keeps, strict=True):
        case.check(one, answer, method, keep)


def test_a_batch_equals_each_alone(case: Case, pictures: list[Image.Image]) -> None:
    """Of several methods."""
    asks = [case.one(PROMPT, pictures[:1], method, 20) for method in (*METHODS, "ficoco-vl")]
    asks.append(case.one(TWO_IMAGES, pictures[:2], "ficoco-l", 9))
    for answer, one in zip(case.engine.call(ask, asks), asks, strict=True):
        (alone,) = case.engine.call(ask, [one])
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["ficoco-l", "fastv", "ficoco-vl"])
def test_slots_and_blocks_are_the_plans(case: Case, pictures: list[Image.Image], method: str) -> None:
    """Counted in the cache itself, layer by layer."""
    reference = case.reference
    config = reference.config
    config.ficoco = {"method": "ficoco-vl", "keep": 16, "windows": "off"}
    planner = ServerPlan.served(config).decoder
    assert planner is not None
    for prompt, images in ((PROMPT, pictures[:1]), (TWO_IMAGES, pictures[1:3])):
        one = case.one(prompt, images, method, 9)
        one.num_tokens = 5  # no segment takes a block in the last step, whose blocks cannot be looked at
        written, blocks, num_tokens = case.engine.call(written_slots, one)
        shown = [case.shown(image, method, 9) for image in images]
        entering = [len(reference.features(each.image, each.entering)) for each in shown]
        name = one.extra["ficoco_method"]
        counts = [planner.counts(name, number, 9) for number in entering]
        expected = [
            num_tokens - sum(entering) + sum(each[segment] for each in counts)
            for segment in range(planner.segments.num_segments)
        ]
        assert written == expected
        assert blocks == [-(-tokens // BLOCK_SIZE) for tokens in expected]
        assert min(expected) < num_tokens


def test_all_kept_equals_stock_bit_for_bit(case: Case, host: Host, pictures: list[Image.Image]) -> None:
    """Stock is model runner V2 without settings, whose layers share one block table."""
    prompts = [(PROMPT, pictures[:1]), (TWO_IMAGES, pictures[1:3]), (TEXT_ONLY, [])]
    kept = []
    for prompt, images in prompts:
        most = max((len(case.reference.features(image, case.num_patches)) for image in images), default=0)
        kept.append(case.one(prompt, images, "ficoco-l", most))
    plain = [Ask(one.prompt, one.images, one.num_tokens) for one in kept]
    stock = host.get(case.folder, {}, block_size=BLOCK_SIZE)
    for answer, expected in zip(case.engine.call(ask, kept), stock.call(ask, plain), strict=True):
        assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
        assert torch.equal(answer.logprobs, expected.logprobs)


def test_equals_hugging_face(case: Case, pictures: list[Image.Image]) -> None:
    """Transformers with the same reduction, in one batch."""
    prompts = [(PROMPT, pictures[:1]), (TWO_IMAGES, pictures[1:3]), (TEXT_ONLY, [])]
    asks = [case.one(text, images, "ficoco-l", 16) for text, images in prompts]
    hf = HfLlava(case.folder)
    with reduce_tokens(hf.model, "ficoco-l", 16):
        answers = hf.ask(prompts, NUM_TOKENS)
    for answer, (tokens, logprobs) in zip(case.engine.call(ask, asks), answers, strict=True):
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_the_check_can_fail(case: Case, pictures: list[Image.Image]) -> None:
    """Negative control: one token more in the end is noticed."""
    (answer,) = case.engine.call(ask, [case.one(PROMPT, pictures[:1], "ficoco-l", 20)])
    shown = case.shown(pictures[0], "ficoco-l", 21)
    logprobs = case.reference.judge("ficoco-l", PROMPT, [shown], answer.tokens)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE
