"""Qwen3-VL reduced in tower and decoder: M-RoPE positions of survivors, deepstack features before the first reduction.

Against the oracle on Hugging Face's model, in float64. One engine, which runs FiCoCo-VL; requests that keep all units
in the tower name the decoder's method alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.decoder import window_calls
from tests.decoder.calls import Ask, ask, written_slots
from tests.decoder.test_reference import left
from tests.reference.algorithm2 import Shown
from tests.reference.qwen3_vl_decoder import ReferenceQwenDecoder
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import Answer
from tests.support.pictures import noise
from tests.support.random_qwen import MOST_UNITS, build
from tests.support.remote import Host, Remote, run_host

pytestmark = [pytest.mark.compat, pytest.mark.engine]

BLOCK_SIZE = 32
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = f"<|im_start|>user\n{IMAGE}what is this?<|im_end|>\n<|im_start|>assistant\n"
TWO_IMAGES = PROMPT.replace(IMAGE, f"first {IMAGE} then {IMAGE}")
TEXT_ONLY = PROMPT.replace(IMAGE, "")
SIZES = [(150, 110), (64, 200), (240, 33), (97, 97)]
# Eight layers in segments of two. Features of three levels are added after the layers 0 to 2, so that no token leaves
# before the attention of layer 3; methods that would reduce earlier start there.
LAYERS = {"ficoco-l": (3, 5), "fastv": (3,), "pyramiddrop": (3, 5), "sparsevlm": (3,)}
TOWER_KEEP = 40


@pytest.fixture(scope="module", params=[0, 4])
def experts(request: pytest.FixtureRequest) -> int:
    """A dense model, and a mixture of experts."""
    return int(request.param)


@pytest.fixture(scope="module")
def host(host: Host, experts: int) -> Iterator[Host]:
    """Experts need groups that vLLM makes only where the first engine of a process has some."""
    if not experts:
        yield host
        return
    with run_host() as of_experts:
        yield of_experts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, experts: int) -> Path:
    return build(tmp_path_factory.mktemp("qwen3-vl"), decoder_layers=8, experts=experts)


@pytest.fixture(scope="module")
def reference(folder: Path) -> ReferenceQwenDecoder:
    """The float64 oracle on the same weights."""
    return ReferenceQwenDecoder(folder)


@pytest.fixture(scope="module")
def options() -> dict[str, Any]:
    """Options that both engines share."""
    return {"block_size": BLOCK_SIZE, "limit_mm_per_prompt": {"image": 2, "video": 0}}


@pytest.fixture(scope="module")
def engine(host: Host, folder: Path, options: dict[str, Any]) -> Remote:
    return host.get(
        folder, {"method": "ficoco-vl", "keep": 16, "num_segments": 4, "windows": "off"}, **options
    )


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=5)


def one(prompt: str, images: list[Image.Image], method: str, keep: int) -> Ask:
    """A request; `ficoco-vl` reduces in the tower as well."""
    if not images:
        return Ask(prompt, [], NUM_TOKENS)
    extra = {"ficoco_method": "ficoco-l" if method == "ficoco-vl" else method, "ficoco_keep": keep}
    mm = {"ficoco_keep": TOWER_KEEP if method == "ficoco-vl" else MOST_UNITS}
    return Ask(prompt, images, NUM_TOKENS, extra, mm)


def shown(reference: ReferenceQwenDecoder, image: Image.Image, method: str, keep: int) -> Shown:
    """An image as a prompt holds it."""
    rows, columns = reference.grid(image)
    entering = min(rows * columns, TOWER_KEEP if method == "ficoco-vl" else MOST_UNITS)
    name = "ficoco-l" if method == "ficoco-vl" else method
    return Shown(image, entering, left(name, entering, min(keep, entering), LAYERS))


def check(reference: ReferenceQwenDecoder, asked: Ask, answer: Answer, method: str, keep: int) -> None:
    """Hold one answer against the oracle."""
    images = [shown(reference, image, method, keep) for image in asked.images]
    logprobs = reference.judge(method, asked.prompt, images, answer.tokens)
    greedy = logprobs.argmax(dim=-1).tolist()
    assert_equal(answer.tokens, answer.logprobs, greedy, logprobs, ends=False)


@pytest.mark.proves(family="Qwen3-VL", site=("decoder", "both"), decoder="Qwen3")
@pytest.mark.proves(family="Qwen3-VL", site=("decoder", "both"), decoder="Qwen3-MoE")
@pytest.mark.parametrize("method", [*LAYERS, "ficoco-vl"])
def test_equals_reference(
    engine: Remote, reference: ReferenceQwenDecoder, pictures: list[Image.Image], method: str
) -> None:
    """In one step: several budgets and sizes, two images, and a prompt without any."""
    keeps = [30, 9, 20, 20, 33]
    prompts = [
        (PROMPT, pictures[:1]),
        (PROMPT, pictures[1:2]),
        (TWO_IMAGES, pictures[1:3]),
        (TEXT_ONLY, []),
        (PROMPT, pictures[3:]),
    ]
    asks = [one(*prompt, method, keep) for prompt, keep in zip(prompts, keeps, strict=True)]
    for asked, answer, keep in zip(asks, engine.call(ask, asks), keeps, strict=True):
        check(reference, asked, answer, method, keep)


def test_the_check_can_fail(
    engine: Remote, reference: ReferenceQwenDecoder, pictures: list[Image.Image]
) -> None:
    """Negative control: one token more in the end is noticed."""
    (answer,) = engine.call(ask, [one(PROMPT, pictures[:1], "ficoco-l", 20)])
    images = [shown(reference, pictures[0], "ficoco-l", 21)]
    logprobs = reference.judge("ficoco-l", PROMPT, images, answer.tokens)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


def test_a_batch_equals_each_alone(engine: Remote, pictures: list[Image.Image]) -> None:
    """Text-only requests after a reduced one see none of its deepstack features."""
    asks = [one(PROMPT, pictures[:1], method, 20) for method in (*LAYERS, "ficoco-vl")]
    asks += [one(TWO_IMAGES, pictures[:2], "ficoco-l", 9), one(TEXT_ONLY, [], "", 0)]
    for answer, asked in zip(engine.call(ask, asks), asks, strict=True):
        (alone,) = engine.call(ask, [asked])
        assert answer.tokens == alone.tokens
        torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("method", ["ficoco-l", "ficoco-vl"])
def test_slots_and_blocks_are_the_plans(
    engine: Remote, reference: ReferenceQwenDecoder, pictures: list[Image.Image], method: str
) -> None:
    """Counted in the cache itself, layer by layer."""
    written, blocks, num_tokens = engine.call(written_slots, one(PROMPT, pictures[:1], method, 9))
    image = shown(reference, pictures[0], method, 9)
    counts = [
        image.left.get(5, 9) if layer > 5 else image.left[3] if layer > 3 else image.entering
        for layer in range(8)
    ]
    expected = [num_tokens - image.entering + count for count in counts]
    assert written == expected
    assert blocks == [-(-tokens // BLOCK_SIZE) for tokens in expected[::2]]
    assert expected[-1] < expected[0]


def test_all_kept_equals_stock_bit_for_bit(
    engine: Remote, host: Host, folder: Path, options: dict[str, Any], pictures: list[Image.Image]
) -> None:
    """Stock is model runner V2 without settings, whose layers share one block table."""
    kept = [
        one(PROMPT, pictures[:1], "ficoco-l", MOST_UNITS),
        one(TWO_IMAGES, pictures[1:3], "ficoco-l", MOST_UNITS),
        one(TEXT_ONLY, [], "", 0),
    ]
    plain = [Ask(asked.prompt, asked.images, asked.num_tokens) for asked in kept]
    answers = engine.call(ask, kept)
    stock = host.get(folder, {}, **options)
    for answer, expected in zip(answers, stock.call(ask, plain), strict=True):
        assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
        assert torch.equal(answer.logprobs, expected.logprobs)


@pytest.mark.long
def test_a_cached_window_equals_reference(
    host: Host, folder: Path, options: dict[str, Any], reference: ReferenceQwenDecoder
) -> None:
    """The decoder's method alone: a second turn finds the image of the first, whose positions have three rows."""
    (image,) = noise([(240, 160)], seed=7)
    second = f"{PROMPT}a sign<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"
    settings = {"method": "ficoco-l", "keep": 30, "num_segments": 4, "windows": "turn"}
    engine = host.get(folder, settings, **options)
    (first,) = engine.call(window_calls.ask, [Ask(PROMPT, [image], NUM_TOKENS)])
    (warm,) = engine.call(window_calls.ask, [Ask(second, [image], NUM_TOKENS)])
    assert warm.num_cached > first.num_prompt_tokens - BLOCK_SIZE
    # 150 tokens down to 30 in two steps, in multiples of a block: 64 leave, then another 64.
    images = [Shown(image, 150, {3: 86, 5: 22}, end=first.num_prompt_tokens)]
    for prompt, reply in ((PROMPT, first), (second, warm)):
        logprobs = reference.judge("ficoco-l", prompt, images, reply.tokens)
        assert_equal(reply.tokens, reply.logprobs, logprobs.argmax(dim=-1).tolist(), logprobs, ends=False)


def without_kernel(engine: Any, answer_one: Ask) -> Answer:
    """Answer a request while the kernel that interpolates position embeddings cannot run."""
    from vllm.model_executor.models import qwen3_vl

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_vl, "_bilinear_pos_embed_kernel", None)
        (answer,) = ask(engine, [answer_one])
    return answer


def test_no_kernel_of_the_tower_is_interpreted(engine: Remote) -> None:
    """Interpreted, one launch takes longer than the rest of the tower."""
    (image,) = noise([(101, 75)], 1)
    assert engine.call(without_kernel, Ask(PROMPT, [image], 1))
