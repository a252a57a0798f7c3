"""Language models other than Llama, reduced in tower and decoder: against the oracle on Hugging Face's, in float64.

One engine each. It runs FiCoCo-VL; requests that keep all patches in the tower name the decoder's method alone.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ficoco_vllm.hf import reduce_tokens
from tests.decoder.calls import Ask, ask, written_slots
from tests.decoder.test_reference import left
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.reference.internvl_chat import ReferenceInternVLChatDecoder
from tests.reference.internvl_decoder import ReferenceInternVLDecoder
from tests.reference.tiles import TiledDecoder
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answer
from tests.support.hugging_face import HfLlava
from tests.support.pictures import noise
from tests.support.random_internvl import IMAGE, UNITS
from tests.support.random_internvl import build as build_internvl
from tests.support.random_internvl_chat import build as build_internvl_chat
from tests.support.random_llava import build, build_next
from tests.support.remote import Host, Remote, run_host

pytestmark = [pytest.mark.compat, pytest.mark.engine]

BLOCK_SIZE = 32
SETTINGS = {"method": "ficoco-vl", "keep": 16, "windows": "off"}
# Width and height; for LLaVA-NeXT, whose tiles are 48 pixels wide: four tiles, three with padding, two with padding in
# both, and a sliver. InternVL's are 96 pixels wide.
SIZES = [(96, 96), (200, 30), (50, 97), (700, 3)]
METHODS = ("ficoco-l", "fastv", "pyramiddrop", "sparsevlm")


@dataclass
class Case:
    """One language model in a LLaVA, a LLaVA-NeXT (Mistral, as published) or an InternVL (Qwen2, as published).

    Attributes:
        folder: of the model.
        reference: oracle on the same weights.
        num_units: of an image, or of a tile.
        engine: runs FiCoCo-VL down to 16 tokens.
        image_token: in prompts.
        options: of all engines.
    """

    folder: Path
    reference: ReferenceDecoder | ReferenceInternVLDecoder
    num_units: int
    engine: Remote
    image_token: str = "<image>"
    options: dict[str, Any] = field(default_factory=dict)

    def shown(self, image: Image.Image, method: str, keep: int) -> Shown:
        """An image as a prompt holds it; `method` ficoco-vl reduces in the tower as well."""
        tower_keep = math.isqrt(self.num_units * 16) if method == "ficoco-vl" else self.num_units
        entering = len(self.reference.features(image, tower_keep))
        decoder_method = "ficoco-l" if method == "ficoco-vl" else method
        return Shown(image, tower_keep, left(decoder_method, entering, min(keep, entering)))

    def one(self, prompt: str, images: list[Image.Image], method: str, keep: int, **more: Any) -> Ask:
        """A request."""
        prompt = prompt.replace("<image>", self.image_token)
        extra = {"ficoco_method": "ficoco-l" if method == "ficoco-vl" else method, "ficoco_keep": keep}
        mm = {} if method == "ficoco-vl" else {"ficoco_keep": self.num_units}
        return Ask(prompt, images, NUM_TOKENS, extra if images else {}, mm if images else {}, **more)

    def check(self, one: Ask, answer: Answer, method: str, keep: int) -> None:
        """Hold one answer against the oracle."""
        shown = [self.shown(image, method, keep) for image in one.images]
        logprobs = self.reference.judge(method, one.prompt, shown, answer.tokens)
        greedy = logprobs.argmax(dim=-1).tolist()
        assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, ends=False)


LLAVAS = ("llava-qwen2", "llava-qwen3", "next-mistral")
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("internvl-moe", "internvl-chat")]


@pytest.fixture(scope="module", params=[*LLAVAS, "internvl", *LONG])
def name(request: pytest.FixtureRequest) -> str:
    """A decoder of a family."""
    return str(request.param)


@pytest.fixture(scope="module")
def host(host: Host, name: str) -> Iterator[Host]:
    """Experts need groups that vLLM makes only where the first engine of a process has some."""
    if name != "internvl-moe":
        yield host
        return
    with run_host() as of_experts:
        yield of_experts


@pytest.fixture(scope="module")
def case(name: str, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Random weights, eight decoder layers."""
    folder = tmp_path_factory.mktemp(name)
    build_one, reference, num_units, options = {
        "llava-qwen2": (build, ReferenceDecoder, 144, {"patch_size": 16, "decoder": "qwen2"}),
        "llava-qwen3": (build, ReferenceDecoder, 144, {"patch_size": 16, "decoder": "qwen3"}),
        "next-mistral": (build_next, TiledDecoder, 36, {"tile_size": 48, "decoder": "mistral"}),
        "internvl": (build_internvl, ReferenceInternVLDecoder, UNITS, {}),
        "internvl-moe": (build_internvl, ReferenceInternVLDecoder, UNITS, {"decoder": "qwen3-moe"}),
        "internvl-chat": (build_internvl_chat, ReferenceInternVLChatDecoder, UNITS, {}),
    }[name]
    build_one(folder, decoder_layers=8, **options)
    of_engines = {"block_size": BLOCK_SIZE, "trust_remote_code": name == "internvl-chat"}
    engine = host.get(folder, SETTINGS, **of_engines)
    image_token = IMAGE if name in ("internvl", "internvl-moe") else "<image>"
    return Case(folder, reference(folder), num_units, engine, image_token, of_engines)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=3)


@pytest.mark.proves(family="LLaVA-1.5", site=("decoder", "both"), decoder="Qwen2")
@pytest.mark.proves(family="LLaVA-1.5", site=("decoder", "both"), decoder="Qwen3")
@pytest.mark.proves(family="LLaVA-NeXT", site=("decoder", "both"), decoder="Mistral")
@pytest.mark.proves(family="InternVL3", site=("decoder", "both"), decoder="Qwen2")
@pytest.mark.proves(family="InternVL3", site=("decoder", "both"), decoder="Qwen3-MoE")
@pytest.mark.proves(family="InternVL3, OpenGVLab's format", site=("decoder", "both"), decoder="Qwen2")
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
    """The requests of the batch name different methods."""
    asks = [case.one(PROMPT, pictures[:1], method, 20) for method in (*METHODS, "ficoco-vl")]
    asks.append(case.one(TWO_IMAGES, pictures[:2], "ficoco-l", 9))
    for answer, one in zip(case.engine.call(ask, asks), asks, strict=True):
        (alone,) = case.engine.call(ask, [one])
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["ficoco-l", "ficoco-vl"])
def test_slots_and_blocks_are_the_plans(case: Case, pictures: list[Image.Image], method: str) -> None:
    """Counted in the cache itself, layer by layer."""
    for prompt, images in ((PROMPT, pictures[:1]), (TWO_IMAGES, pictures[1:3])):
        one = case.one(prompt, images, method, 9)
        one.num_tokens = 5  # no segment takes a block in the last step, whose blocks cannot be looked at
        written, blocks, num_tokens = case.engine.call(written_slots, one)
        expected = [num_tokens] * 8
        for image in images:
            shown = case.shown(image, method, 9)
            entering = len(case.reference.features(image, shown.entering))
            for layer in range(8):
                left_before = [count for reducing, count in shown.left.items() if reducing < layer]
                expected[layer] -= entering - min([entering, *left_before])
        assert written == expected
        assert blocks == [-(-tokens // BLOCK_SIZE) for tokens in expected]
        assert expected[-1] < num_tokens


@pytest.mark.parametrize(
    "name",
    ["internvl", *(pytest.param(name, marks=pytest.mark.long) for name in LLAVAS), *LONG],
    indirect=True,
)
def test_all_kept_equals_stock_bit_for_bit(case: Case, host: Host, pictures: list[Image.Image]) -> None:
    """Stock is model runner V2 without settings, whose layers share one block table."""
    prompts = [(PROMPT, pictures[:1]), (TWO_IMAGES, pictures[1:3]), (TEXT_ONLY, [])]
    kept = []
    for prompt, images in prompts:
        most = max((len(case.reference.features(image, case.num_units)) for image in images), default=0)
        kept.append(case.one(prompt, images, "ficoco-l", most))
    plain = [Ask(one.prompt, one.images, one.num_tokens) for one in kept]
    stock = host.get(case.folder, {}, **case.options)
    for answer, expected in zip(case.engine.call(ask, kept), stock.call(ask, plain), strict=True):
        assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
        assert torch.equal(answer.logprobs, expected.logprobs)


@pytest.mark.parametrize("name", LLAVAS, indirect=True)
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
    prompt = PROMPT.replace("<image>", case.image_token)
    logprobs = case.reference.judge("ficoco-l", prompt, [shown], answer.tokens)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE
