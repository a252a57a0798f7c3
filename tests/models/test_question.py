"""Methods that compare the image with the question: against the same on Hugging Face's model, in float64."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from ficoco_vllm import demo_model
from ficoco_vllm.reduction import get
from ficoco_vllm.vision.text_encoder import check_text_encoder
from tests.models.checks import assert_together_equals_alone
from tests.reference.dense_tower import DenseLlava
from tests.reference.internvl import ReferenceInternVL
from tests.reference.internvl_chat import ReferenceInternVLChat
from tests.reference.qwen3_vl import ReferenceQwen
from tests.reference.tiles import TiledDense
from tests.support.compare import NUM_TOKENS, assert_equal
from tests.support.engine import PROMPT, Engines, ask
from tests.support.engine import request as make_request
from tests.support.pictures import noise
from tests.support.random_internvl import IMAGE
from tests.support.random_qwen import IMAGE as QWEN_IMAGE
from tests.support.random_qwen import VISION_END, VISION_START

pytestmark = [pytest.mark.compat, pytest.mark.engine]

METHODS = ("cdpruner", "recoverable", "trim")
QWEN_PROMPT = (
    f"<|im_start|>user\n{VISION_START}{QWEN_IMAGE}{VISION_END}what is it?<|im_end|>\n<|im_start|>assistant\n"
)
QUESTIONS = ("what number is on the left sign?", "is it a circle?")


def as_served(reference: Any, method: str) -> None:
    """Set the method, with the settings of a server that compares the language model's embeddings."""
    with_sign = "negate" in get(method).settings.model_fields
    reference.method, reference.settings = method, {"negate": False} if with_sign else {}


@pytest.fixture(scope="module")
def engine(engines: Engines, random_llava: Path) -> LLM:
    return engines.get(random_llava, {"method": "trim", "keep": 64})


@pytest.fixture(scope="module")
def reference(random_llava: Path) -> DenseLlava:
    return DenseLlava(random_llava)


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_equals_reference(
    engine: LLM, reference: DenseLlava, images: list[Image.Image], method: str, question: str
) -> None:
    as_served(reference, method)
    reference.question = question
    for keep in (65, 9):
        asked = make_request(
            PROMPT, [images[1]], ficoco_method=method, ficoco_keep=keep, ficoco_question=question
        )
        (answer,) = ask(engine, [asked], NUM_TOKENS)
        tokens, logprobs = reference.generate(PROMPT, [(images[1], keep)], NUM_TOKENS)
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


@pytest.mark.parametrize(
    ("model", "oracle", "prompt", "size", "options"),
    [
        ("random_next", TiledDense, PROMPT, (288, 96), {}),
        ("random_internvl", ReferenceInternVL, PROMPT.replace("<image>", IMAGE), (300, 200), {}),
        ("random_internvl_chat", ReferenceInternVLChat, PROMPT, (300, 200), {"trust_remote_code": True}),
        ("random_qwen", ReferenceQwen, QWEN_PROMPT, (150, 90), {}),
    ],
)
def test_other_families_equal_reference(
    engines: Engines,
    request: pytest.FixtureRequest,
    model: str,
    oracle: Any,
    prompt: str,
    size: tuple[int, int],
    options: dict[str, Any],
) -> None:
    """In tiles, in units of four patches, and with merged patches."""
    folder = request.getfixturevalue(model)
    engine, reference = engines.get(folder, {"method": "cdpruner", "keep": 9}, **options), oracle(folder)
    (image,) = noise([size], seed=4)
    for method, question in zip(METHODS, (*QUESTIONS, QUESTIONS[0]), strict=True):
        as_served(reference, method)
        reference.question = question
        asked = make_request(prompt, [image], ficoco_method=method, ficoco_question=question)
        (answer,) = ask(engine, [asked], NUM_TOKENS)
        tokens, logprobs = reference.generate(prompt, [(image, 9)], NUM_TOKENS)
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_the_question_decides(reference: DenseLlava, images: list[Image.Image]) -> None:
    """Otherwise the test above would compare what no question changes."""
    as_served(reference, "trim")
    kept = []
    for question in QUESTIONS:
        reference.question = question
        kept.append(reference.features(images[1], 64))
    assert not torch.allclose(*kept)


def test_without_a_question_the_prompt_is_the_question(
    engine: LLM, reference: DenseLlava, images: list[Image.Image]
) -> None:
    as_served(reference, "trim")
    tokenizer = engine.get_tokenizer()
    image = engine.llm_engine.model_config.hf_config.image_token_id
    text = [token for token in tokenizer(PROMPT).input_ids if token != image]
    reference.question = tokenizer.decode(text, skip_special_tokens=True)
    (answer,) = ask(engine, [make_request(PROMPT, [images[2]], ficoco_keep=64)], NUM_TOKENS)
    tokens, logprobs = reference.generate(PROMPT, [(images[2], 64)], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_without_a_question_the_place_of_an_image_is_not_part_of_it(
    engines: Engines, random_internvl_chat: Path
) -> None:
    """In OpenGVLab's format it is a text of the prompt, not a token."""
    engine = engines.get(random_internvl_chat, {"method": "cdpruner", "keep": 9}, trust_remote_code=True)
    reference = ReferenceInternVLChat(random_internvl_chat)
    as_served(reference, "cdpruner")
    reference.question = PROMPT.removeprefix("<s>").replace("<image>", "")
    (image,) = noise([(300, 200)], seed=4)
    (answer,) = ask(engine, [make_request(PROMPT, [image])], NUM_TOKENS)
    tokens, logprobs = reference.generate(PROMPT, [(image, 9)], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)
    kept = reference.features(image, 9)
    reference.question = PROMPT.removeprefix("<s>")
    assert not torch.equal(reference.features(image, 9), kept), "that text would change nothing"


def test_questions_in_one_step_equal_each_alone(engine: LLM, images: list[Image.Image]) -> None:
    """Questions of different lengths, one of them empty, in a step with images without a question; one image twice."""
    requests = [
        make_request(
            PROMPT, [images[index // 2]], ficoco_method=method, ficoco_keep=keep, ficoco_question=text
        )
        for index, (method, keep, text) in enumerate(
            [
                ("trim", 64, QUESTIONS[0]),
                ("trim", 64, QUESTIONS[1]),
                ("trim", 64, ""),
                ("ficoco-v", 64, QUESTIONS[1]),
                ("cdpruner", 64, QUESTIONS[1] * 9),
                ("trim", 576, QUESTIONS[1]),
            ]
        )
    ]
    assert_together_equals_alone(engine, requests, 3)


def test_no_cache_mixes_two_questions(engine: LLM, images: list[Image.Image]) -> None:
    """Asked again, the second finds the image; asked otherwise, it does not."""

    def hashes(**fields: Any) -> Any:
        processed = engine.renderer.render_cmpl([make_request(PROMPT, [images[0]], **fields)])
        return processed[0]["mm_hashes"]["image"]

    first = hashes(ficoco_question=QUESTIONS[0])
    assert hashes(ficoco_question=QUESTIONS[0]) == first
    assert hashes(ficoco_question=QUESTIONS[1]) != first
    one = hashes(ficoco_method="ficoco-v", ficoco_question=QUESTIONS[0])
    assert hashes(ficoco_method="ficoco-v", ficoco_question=QUESTIONS[1]) == one, "a method that reads none"


def test_a_question_is_a_text(engine: LLM, images: list[Image.Image]) -> None:
    with pytest.raises(VLLMValidationError, match="ficoco_question = 3 is not allowed; allowed: a text"):
        ask(engine, [make_request(PROMPT, [images[0]], ficoco_question=3)])


@pytest.fixture(scope="module")
def clip(random_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP of the tower's width that reads letters, 14 at a time."""
    return build_clip(tmp_path_factory.mktemp("clip"), vision_width(random_llava))


def vision_width(model: Path) -> int:
    return int(json.loads((model / "config.json").read_text())["vision_config"]["hidden_size"])


def build_clip(folder: Path, width: int) -> Path:
    """Save a CLIP with a vision tower of this width."""
    ends = ("<|startoftext|>", "<|endoftext|>")
    letters = [*bytes_to_unicode().values()]
    vocab = {
        token: index for index, token in enumerate([*letters, *(f"{one}</w>" for one in letters), *ends])
    }
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    small = {"intermediate_size": 64, "num_attention_heads": 2}
    text = {**small, "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": len(vocab)}
    text |= {"max_position_embeddings": 16, "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    vision = {**small, "hidden_size": width, "num_hidden_layers": 1}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_text_encoder_reads_the_question(
    engines: Engines, random_llava: Path, clip: Path, images: list[Image.Image], method: str
) -> None:
    engine = engines.get(random_llava, {"method": "trim", "keep": 64, "text_encoder": str(clip)})
    reference = DenseLlava(random_llava)
    reference.method, reference.settings = method, {}
    reference.clip = CLIPModel.from_pretrained(clip).eval().double()
    reference.clip_tokenizer = CLIPTokenizer.from_pretrained(clip)
    for question in ("is it red?", QUESTIONS[0]):
        reference.question = question
        asked = make_request(PROMPT, [images[1]], ficoco_method=method, ficoco_question=question)
        (answer,) = ask(engine, [asked], NUM_TOKENS)
        tokens, logprobs = reference.generate(PROMPT, [(images[1], 64)], NUM_TOKENS)
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda folder: build_clip(folder, 24),
            "has a vision tower of width 24; allowed: the CLIP from which",
        ),
        (lambda folder: folder / "missing", "missing' cannot be read"),
        (lambda folder: demo_model.path(), "is a model of type 'llava'; allowed: a CLIP"),
    ],
    ids=["width", "missing", "type"],
)
def test_a_text_encoder_that_does_not_fit_is_refused(
    random_llava: Path, tmp_path: Path, build: Callable[[Path], Path], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_text_encoder(str(build(tmp_path)), AutoConfig.from_pretrained(random_llava))


def test_a_text_encoder_needs_a_tower_of_clip(random_internvl: Path, clip: Path) -> None:
    with pytest.raises(ValueError, match="whose vision tower is not a CLIP; allowed: none"):
        check_text_encoder(str(clip), AutoConfig.from_pretrained(random_internvl))
