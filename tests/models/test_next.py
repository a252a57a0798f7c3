"""LLaVA-NeXT as served against each tile reduced plainly on Hugging Face's model, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.hf import reduce_tokens
from tests.models.checks import assert_images_equal, assert_together_equals_alone
from tests.reference.tiles import TiledDense, TiledLlava
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import (
    PROMPT,
    TEXT_ONLY,
    TWO_IMAGES,
    Answers,
    Engines,
    Question,
    ask,
    ask_all,
    request,
)
from tests.support.hugging_face import HfLlava
from tests.support.pictures import noise
from tests.support.subprocess_engine import answers

pytestmark = [pytest.mark.compat, pytest.mark.engine]

# Width and height; tiles are 96 pixels wide. Exactly four tiles and exactly three; very wide, very tall, a line of
# pixels, tiny, and sizes that leave padding in one tile or in several.
SIZES = [(192, 192), (288, 96), (300, 40), (40, 300), (700, 3), (10, 10), (97, 191), (250, 130)]
BUDGETS = (143, 64, 16, 9, 1)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=1)


@pytest.fixture(scope="module")
def engine(engines: Engines, random_next: Path) -> LLM:
    """FiCoCo-V with 16 tokens a tile."""
    return engines.get(random_next, {"method": "ficoco-v", "keep": 16})


@pytest.fixture(scope="module")
def reference(random_next: Path) -> TiledLlava:
    """The float64 oracle on the same weights."""
    return TiledLlava(random_next)


@pytest.mark.proves(family="LLaVA-NeXT", site="tower")
@pytest.mark.parametrize("keep", BUDGETS)
def test_equals_reference(engine: LLM, reference: TiledLlava, pictures: list[Image.Image], keep: int) -> None:
    assert_images_equal(engine, reference, PROMPT, pictures, keep)


def test_two_images_equal_reference(engine: LLM, reference: TiledLlava, pictures: list[Image.Image]) -> None:
    """One of four tiles and one of three with padding."""
    (answer,) = ask(engine, [request(TWO_IMAGES, [pictures[0], pictures[2]])], NUM_TOKENS)
    tokens, logprobs = reference.generate(TWO_IMAGES, [(pictures[0], 16), (pictures[2], 16)], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


@pytest.mark.parametrize("method", ["ficoco-v", "tome", "evit"])
def test_equals_hugging_face(
    engine: LLM, random_next: Path, pictures: list[Image.Image], method: str
) -> None:
    """Transformers with the same reduction, all sizes in one batch."""
    hf = HfLlava(random_next)
    with reduce_tokens(hf.model, method, 16):
        answers = hf.ask([(PROMPT, [image]) for image in pictures], NUM_TOKENS)
    requests = [request(PROMPT, [image], ficoco_method=method, ficoco_keep=16) for image in pictures]
    for answer, (tokens, logprobs) in zip(ask(engine, requests, NUM_TOKENS), answers, strict=True):
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_batched_equals_alone(engine: LLM, pictures: list[Image.Image]) -> None:
    """All sizes with three budgets, one of them all tokens, text between them, in one step."""
    requests = []
    for index, image in enumerate(pictures):
        requests.append(request(PROMPT, [image], ficoco_keep=(16, 144, 9)[index % 3]))
        if index % 3 == 0:
            requests.append(request(TEXT_ONLY))
    assert_together_equals_alone(engine, requests)


@pytest.mark.parametrize("method", ["tome", "evit", "topk-cls", "spatial-pool", "visionzip", "divprune"])
def test_other_methods_equal_reference(
    engine: LLM, random_next: Path, pictures: list[Image.Image], method: str
) -> None:
    """Merging with weights, fused tokens without a place, selection on the features, places of the crop."""
    reference = TiledDense(random_next)
    reference.method, reference.settings = method, {}
    assert_images_equal(engine, reference, PROMPT, pictures, 20, ficoco_method=method)


def test_the_check_can_fail(engine: LLM, reference: TiledLlava, pictures: list[Image.Image]) -> None:
    """Negative control: one more token in each tile is detected."""
    (answer,) = ask(engine, [request(PROMPT, [pictures[0]])], 1)
    _, logprobs = reference.generate(PROMPT, [(pictures[0], 17)], 1)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ficoco_keep": 145}, "ficoco_keep = 145 is not allowed; allowed: an integer from 1 to 144"),
        ({"ficoco_keep": 0}, "ficoco_keep = 0 is not allowed"),
        ({"ficoco_method": "evit", "ficoco_keep": 1}, "ficoco_keep = 1: "),
    ],
)
def test_budgets_out_of_range_are_refused(
    engine: LLM, pictures: list[Image.Image], kwargs: dict[str, object], message: str
) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        ask(engine, [request(PROMPT, [pictures[0]], **kwargs)], 1)


def test_a_budget_for_the_image_is_shared_by_its_tiles(
    engines: Engines,
    random_next: Path,
    reference: TiledLlava,
    pictures: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """200 tokens; 3, so that some tiles keep none; and 280, all of what the smallest images have."""
    monkeypatch.setattr(reference, "per_image", True)
    engine = engines.get(random_next, {"method": "ficoco-v", "keep": 200, "keep_per": "image"})
    for keep in (200, 3, 280):
        result = ask(engine, [request(PROMPT, [image], ficoco_keep=keep) for image in pictures], NUM_TOKENS)
        for image, answer in zip(pictures, result, strict=True):
            tokens, logprobs = reference.generate(PROMPT, [(image, keep)], NUM_TOKENS)
            assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


ASKED: list[Question] = [
    *((PROMPT, [index], {}) for index in range(len(SIZES))),
    (TEXT_ONLY, [], {}),
    (TWO_IMAGES, [1, 3], {}),
]


@pytest.fixture(scope="module")
def stock(
    random_next: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Answers of vLLM without any plugin."""
    folder = tmp_path_factory.mktemp("stock-next")
    return answers(folder, random_next, pictures, ASKED, environment={"VLLM_PLUGINS": ""}, dtype="bfloat16")


@pytest.mark.parametrize(
    "ficoco",
    [None, {"method": "ficoco-v", "keep": 144}, {"method": "ficoco-v", "keep": 143}],
    ids=["no settings", "keep all", "keep one less"],
)
def test_equals_stock_bit_for_bit(
    stock: Answers,
    engines: Engines,
    random_next: Path,
    pictures: list[Image.Image],
    ficoco: dict[str, Any] | None,
) -> None:
    """With one token less in each tile the answers differ; otherwise the check could not fail."""
    ours = ask_all(engines.get(random_next, ficoco, dtype="bfloat16"), pictures, ASKED)
    assert stock.model_class == "vllm.model_executor.models.llava_next.LlavaNextForConditionalGeneration"
    assert ours.model_class == "ficoco_vllm.models.llava_next.FicocoLlavaNext"
    for index, (answer, expected) in enumerate(zip(ours.answers, stock.answers, strict=True)):
        reduced = ficoco is not None and ficoco["keep"] == 143 and ASKED[index][1]
        same = answer.tokens == expected.tokens and torch.equal(answer.logprobs, expected.logprobs)
        assert answer.num_prompt_tokens == expected.num_prompt_tokens or reduced
        assert same is not bool(reduced)
