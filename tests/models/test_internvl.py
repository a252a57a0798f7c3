"""InternVL as served against each tile reduced plainly on Hugging Face's model, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from tests.models.checks import assert_images_equal, assert_together_equals_alone
from tests.reference.internvl import ReferenceInternVL
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import Answers, Engines, Question, ask, ask_all, request
from tests.support.pictures import noise
from tests.support.random_internvl import IMAGE, UNITS
from tests.support.subprocess_engine import answers

pytestmark = [pytest.mark.compat, pytest.mark.engine]

# Width and height; tiles are 96 pixels wide. One tile; four, six and three with a thumbnail; a line of pixels; tiny.
SIZES = [(96, 96), (192, 192), (300, 200), (40, 300), (700, 3), (10, 10), (97, 191)]
PROMPT = f"<s>USER: {IMAGE}\nwhat number is on the sign? ASSISTANT:"
TWO_IMAGES = f"<s>USER: {IMAGE}\n{IMAGE}\nhow many signs are there? ASSISTANT:"
TEXT_ONLY = "<s>USER: is there a red sign? ASSISTANT:"


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=1)


@pytest.fixture(scope="module")
def engine(engines: Engines, random_internvl: Path) -> LLM:
    """FiCoCo-V with 9 tokens a tile."""
    return engines.get(random_internvl, {"method": "ficoco-v", "keep": 9})


@pytest.fixture(scope="module")
def reference(random_internvl: Path) -> ReferenceInternVL:
    """The float64 oracle on the same weights."""
    return ReferenceInternVL(random_internvl)


@pytest.mark.proves(family="InternVL3", site="tower")
@pytest.mark.parametrize("keep", [UNITS, UNITS - 1, 16, 4, 1])
def test_equals_reference(
    engine: LLM, reference: ReferenceInternVL, pictures: list[Image.Image], keep: int
) -> None:
    assert_images_equal(engine, reference, PROMPT, pictures, keep)


@pytest.mark.parametrize("method", ["tome", "evit", "topk-cls", "visionzip", "divprune"])
def test_other_methods_equal_reference(
    engine: LLM,
    reference: ReferenceInternVL,
    pictures: list[Image.Image],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Merging with weights, fused units without a place, selection on the features."""
    monkeypatch.setattr(reference, "method", method)
    assert_images_equal(engine, reference, PROMPT, pictures, 9, ficoco_method=method)


def test_two_images_equal_reference(
    engine: LLM, reference: ReferenceInternVL, pictures: list[Image.Image]
) -> None:
    """One tile, and six with a thumbnail."""
    (answer,) = ask(engine, [request(TWO_IMAGES, [pictures[0], pictures[2]])], NUM_TOKENS)
    tokens, logprobs = reference.generate(TWO_IMAGES, [(pictures[0], 9), (pictures[2], 9)], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_batched_equals_alone(engine: LLM, pictures: list[Image.Image]) -> None:
    """All sizes with three budgets, one of them all tokens, text between them, in one step."""
    requests = []
    for index, image in enumerate(pictures):
        requests.append(request(PROMPT, [image], ficoco_keep=(9, UNITS, 4)[index % 3]))
        if index % 3 == 0:
            requests.append(request(TEXT_ONLY))
    assert_together_equals_alone(engine, requests)


def test_the_check_can_fail(engine: LLM, reference: ReferenceInternVL, pictures: list[Image.Image]) -> None:
    """Negative control: one more token in each tile is detected."""
    (answer,) = ask(engine, [request(PROMPT, [pictures[1]])], 1)
    _, logprobs = reference.generate(PROMPT, [(pictures[1], 10)], 1)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ficoco_keep": UNITS + 1}, "ficoco_keep = 37 is not allowed; allowed: an integer from 1 to 36"),
        ({"ficoco_method": "evit", "ficoco_keep": 1}, "ficoco_keep = 1: "),
        ({"max_patches": 2}, "max_patches = 2 in mm_processor_kwargs is not allowed .* allowed: 6"),
        ({"images_kwargs": {"crop_to_patches": False}}, "crop_to_patches = False in mm_processor_kwargs"),
    ],
)
def test_refused(engine: LLM, pictures: list[Image.Image], kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        ask(engine, [request(PROMPT, [pictures[0]], **kwargs)], 1)


def test_a_video_stays_whole(engine: LLM, pictures: list[Image.Image]) -> None:
    """Two frames beside an image that is reduced: the prompt has all units of the frames."""
    frames = torch.stack([torch.full((96, 96, 3), value, dtype=torch.uint8) for value in (9, 200)])
    alone = {
        "prompt": "<s>USER: <video>\nhow many? ASSISTANT:",
        "multi_modal_data": {"video": [frames.numpy()]},
    }
    both = {
        "prompt": f"<s>USER: <video>\n{IMAGE}\nhow many? ASSISTANT:",
        "multi_modal_data": {"video": [frames.numpy()], "image": [pictures[1]]},
    }
    one, two = (ask(engine, [prompt], 1)[0].num_prompt_tokens for prompt in (alone, both))
    assert one > 2 * UNITS
    assert two - one == 5 * 9 + 3


def asked(**kwargs: Any) -> list[Question]:
    """Each picture, text alone, and two pictures.

    Args:
        **kwargs: of the processor, for prompts with images.
    """
    alone: list[Question] = [(PROMPT, [index], kwargs) for index in range(len(SIZES))]
    return [*alone, (TEXT_ONLY, [], {}), (TWO_IMAGES, [1, 3], kwargs)]


@pytest.fixture(scope="module")
def stock(
    random_internvl: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Answers of vLLM without any plugin."""
    folder = tmp_path_factory.mktemp("stock-internvl")
    return answers(folder, random_internvl, pictures, asked(), environment={"VLLM_PLUGINS": ""})


@pytest.mark.parametrize("keep", [UNITS, UNITS - 1])
def test_equals_stock_bit_for_bit(
    stock: Answers, engine: LLM, pictures: list[Image.Image], keep: int
) -> None:
    """With one token less in each tile the answers differ; otherwise the check could not fail."""
    ours = ask_all(engine, pictures, asked(ficoco_keep=keep))
    assert stock.model_class == "vllm.model_executor.models.interns1.InternS1ForConditionalGeneration"
    assert ours.model_class == "ficoco_vllm.models.internvl.FicocoInternVL"
    for (_, images, _), answer, expected in zip(asked(), ours.answers, stock.answers, strict=True):
        reduced = keep < UNITS and images
        same = answer.tokens == expected.tokens and torch.equal(answer.logprobs, expected.logprobs)
        assert answer.num_prompt_tokens == expected.num_prompt_tokens or reduced
        assert same is not bool(reduced)
