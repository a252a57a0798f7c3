"""Reduction in Hugging Face's models against the algorithms written plainly, in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.reduction import available, get
from tests.decoder.test_reference import LAYERS, LAYERS_OF_TWO, left
from tests.reference.algorithm2 import ReferenceDecoder, Shown
from tests.reference.dense_tower import DenseLlava
from tests.reference.tiles import TiledDecoder, TiledDense
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.hugging_face import HfLlava
from tests.support.pictures import noise

LONG = "<s>USER: <image>\nplease say in one word which of the signs is the largest? ASSISTANT:"
VISION = [*available("encoder"), *available("features")]
TEXT_GUIDED = [name for name in VISION if "text_relevance" in get(name).required_signals()]
IN_TOWER = [name for name in VISION if name not in TEXT_GUIDED]
SETTINGS: list[dict[str, Any]] = [
    {"filter": "cls_attention", "correlate": "key_cosine", "compress": "quantile_merge", "epsilon": 0.99},
    {"attention": "logits"},
    {"proportional_attention": True, "schedule": "geometric", "start_layer": 2},
]
# Width and height; tiles are 48 pixels wide: four tiles, three with padding, two with padding in both, a tiny image and
# a sliver.
SIZES = [(96, 96), (200, 30), (50, 97), (10, 10), (700, 3)]
PATCHES = 36


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise, for LLaVA-NeXT."""
    return noise(SIZES, seed=2)


@pytest.mark.parametrize("method", IN_TOWER)
def test_tower(random_hf: HfLlava, random_llava: Path, images: list[Image.Image], method: str) -> None:
    """A prompt with one image, one with two and one without, of different lengths, in one batch."""
    reference = DenseLlava(random_llava)
    reference.method, reference.settings = method, {}
    # In image 1 PruMerge+ meets two neighbours whose cosines differ by 1.6e-7, less than float32's keys are off by.
    first = images[3 if method == "prumerge-plus" else 1]
    prompts = [(PROMPT, [first]), (TWO_IMAGES, [images[3], first]), (TEXT_ONLY, [])]
    with reduce_tokens(random_hf.model, method, 64) as reduction:
        answers = random_hf.ask(prompts, 3)
    assert reduction.tokens == (3, 3 * 576, 3 * 64, 3 * 64)
    for (text, shown), (tokens, logprobs) in zip(prompts, answers, strict=True):
        expected, exact = reference.generate(text, [(image, 64) for image in shown], 3)
        assert_equal(tokens, logprobs, expected, exact, ends=False)


@pytest.mark.parametrize("method", TEXT_GUIDED)
def test_the_question(random_hf: HfLlava, random_llava: Path, images: list[Image.Image], method: str) -> None:
    """In one batch, about one image and about two; the question is the prompt without special tokens."""
    reference = DenseLlava(random_llava)
    as_served(reference, method)
    prompts = [(PROMPT, [images[1]]), (TWO_IMAGES, [images[3], images[1]]), (TEXT_ONLY, [])]
    with reduce_tokens(random_hf.model, method, 64) as reduction:
        answers = random_hf.ask(prompts, 3)
    assert reduction.tokens == (3, 3 * 576, 3 * 64, 3 * 64)
    for (text, shown), (tokens, logprobs) in zip(prompts, answers, strict=True):
        reference.question = question_of(random_hf, text)
        expected, exact = reference.generate(text, [(image, 64) for image in shown], 3)
        assert_equal(tokens, logprobs, expected, exact, ends=False)
    reference.question = question_of(random_hf, TWO_IMAGES)
    _, other = reference.generate(PROMPT, [(images[1], 64)], 3)
    assert (other - answers[0][1]).abs().max() > 10 * TOLERANCE, "the question would change nothing"


def question_of(hf: HfLlava, prompt: str) -> str:
    """The text of a prompt, as a server takes it for the question where a request names none."""
    tokenizer = hf.processor.tokenizer
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    left = [token for token in ids if token != hf.model.config.image_token_id]
    return str(tokenizer.decode(left, skip_special_tokens=True))


def test_the_question_of_beams(random_hf: HfLlava, images: list[Image.Image]) -> None:
    """Images are encoded once; of the beams, the first is the one that is alone where the others are cut off."""
    inputs = random_hf.inputs([(PROMPT, [images[1]]), (TWO_IMAGES, [images[3], images[1]])])
    with reduce_tokens(random_hf.model, "cdpruner", 64) as reduction:
        greedy = random_hf.model.generate(**inputs, max_new_tokens=1, do_sample=False)
        kept = reduction.kept
        beams = random_hf.model.generate(
            **inputs, max_new_tokens=1, do_sample=False, num_beams=3, num_return_sequences=3
        )
    assert torch.equal(beams[::3], greedy)
    assert [one.tolist() for one in reduction.kept] == [
        one.tolist() for index in ((0,) * 3, (1, 2) * 3) for one in (kept[place] for place in index)
    ]


def test_the_question_about_tiles(
    small_next: HfLlava, small_next_folder: Path, pictures: list[Image.Image]
) -> None:
    reference = TiledDense(small_next_folder)
    as_served(reference, "trim")
    prompts = [(PROMPT, [pictures[0]]), (TWO_IMAGES, pictures[1:3])]
    with reduce_tokens(small_next.model, "trim", 9):
        answers = small_next.ask(prompts, 2)
    for (text, shown), (tokens, logprobs) in zip(prompts, answers, strict=True):
        reference.question = question_of(small_next, text)
        expected, exact = reference.generate(text, [(image, 9) for image in shown], 2)
        assert_equal(tokens, logprobs, expected, exact, ends=False)


@pytest.mark.parametrize("settings", SETTINGS, ids=["composed", "logits", "proportional"])
def test_settings(
    random_hf: HfLlava, random_llava: Path, images: list[Image.Image], settings: dict[str, Any]
) -> None:
    reference = DenseLlava(random_llava)
    reference.method, reference.settings = "ficoco-v", settings
    with reduce_tokens(random_hf.model, "ficoco-v", 64, **settings):
        ((tokens, logprobs),) = random_hf.ask([(PROMPT, [images[3]])], 3)
    assert_equal(tokens, logprobs, *reference.generate(PROMPT, [(images[3], 64)], 3), ends=False)


@pytest.mark.parametrize("method", ["ficoco-v", "tome", "evit", "topk-cls", "spatial-pool", "visionzip"])
@pytest.mark.parametrize("keep", [9, 35])
def test_tiles(
    small_next: HfLlava, small_next_folder: Path, pictures: list[Image.Image], method: str, keep: int
) -> None:
    """Images of all sizes in one batch; one prompt has two."""
    reference = TiledDense(small_next_folder)
    reference.method, reference.settings = method, {}
    prompts = [(PROMPT, [image]) for image in pictures]
    prompts += [(TWO_IMAGES, pictures[:2]), (TEXT_ONLY, [])]
    with reduce_tokens(small_next.model, method, keep) as reduction:
        answers = small_next.ask(prompts, 2)
    for (text, shown), (tokens, logprobs) in zip(prompts, answers, strict=True):
        expected, exact = reference.generate(text, [(image, keep) for image in shown], 2)
        assert_equal(tokens, logprobs, expected, exact, ends=False)
    assert [len(kept) for kept in reduction.kept] == [
        len(reference.features(image, keep)) for _, shown in prompts for image in shown
    ]


def test_tiles_share_a_budget_for_the_image(
    small_next: HfLlava, small_next_folder: Path, pictures: list[Image.Image]
) -> None:
    """A budget that is all of what the smallest images have: these are left as they are."""
    reference = TiledDense(small_next_folder)
    reference.method, reference.settings, reference.per_image = "ficoco-v", {}, True
    prompts = [(PROMPT, [image]) for image in pictures]
    with reduce_tokens(small_next.model, "ficoco-v", 72, keep_per="image"):
        answers = small_next.ask(prompts, 2)
    for (text, (image,)), (tokens, logprobs) in zip(prompts, answers, strict=True):
        assert_equal(tokens, logprobs, *reference.generate(text, [(image, 72)], 2), ends=False)


def as_served(reference: DenseLlava, method: str) -> None:
    """Set a method that compares the language model's embeddings, whose relevance is not negated."""
    with_sign = "negate" in get(method).settings.model_fields
    reference.method, reference.settings = method, {"negate": False} if with_sign else {}


def check_decoder(
    reference: ReferenceDecoder, method: str, text: str, shown: list[Shown], answer: tuple[list[int], Any]
) -> None:
    """Hold an answer against the oracle of the decoder."""
    tokens, logprobs = answer
    exact = reference.judge(method, text, shown, tokens)
    assert_equal(tokens, logprobs, exact.argmax(dim=-1).tolist(), exact, ends=False)


@pytest.mark.parametrize("method", list(LAYERS))
@pytest.mark.parametrize("num_segments", [None, 4])
def test_decoder(
    small_hf: HfLlava, small_folder: Path, images: list[Image.Image], method: str, num_segments: int | None
) -> None:
    """Prompts of different lengths and numbers of images in one batch; segments of one layer and of two."""
    reference = ReferenceDecoder(small_folder)
    prompts = [(PROMPT, images[:1]), (LONG, images[1:2]), (TWO_IMAGES, images[2:4]), (TEXT_ONLY, [])]
    layers = LAYERS if num_segments is None else LAYERS_OF_TWO
    counts = left(method, 144, 16, layers)
    with reduce_tokens(small_hf.model, method, 16, num_segments=num_segments) as reduction:
        answers = small_hf.ask(prompts, NUM_TOKENS)
    for (text, of_prompt), answer in zip(prompts, answers, strict=True):
        check_decoder(reference, method, text, [Shown(image, 144, counts) for image in of_prompt], answer)
    held = [144] * 8
    for layer, count in counts.items():
        held[layer + 1 :] = [count] * (7 - layer)
    assert reduction.tokens == (4, 4 * 144, 4 * 16, 4 * sum(held) / 8)


def test_tower_then_decoder(small_hf: HfLlava, small_folder: Path, images: list[Image.Image]) -> None:
    reference = ReferenceDecoder(small_folder)
    with reduce_tokens(small_hf.model, "ficoco-vl", 16) as reduction:
        answers = small_hf.ask([(PROMPT, images[:1]), (TWO_IMAGES, images[2:4])], NUM_TOKENS)
    for text, of_prompt, answer in zip((PROMPT, TWO_IMAGES), (images[:1], images[2:4]), answers, strict=True):
        shown = [Shown(image, 48, left("ficoco-l", 48, 16)) for image in of_prompt]  # 48 = sqrt(144 * 16)
        check_decoder(reference, "ficoco-vl", text, shown, answer)
    assert all(len(kept.unique()) == 16 and kept.max() < 144 for kept in reduction.kept)


@pytest.mark.parametrize("method", ["ficoco-l", "fastv", "ficoco-vl"])
def test_decoder_of_tiles(
    small_next: HfLlava, small_next_folder: Path, pictures: list[Image.Image], method: str
) -> None:
    reference = TiledDecoder(small_next_folder)
    in_tower, in_decoder = (24, "ficoco-l") if method == "ficoco-vl" else (PATCHES, method)
    prompts = [(PROMPT, [image]) for image in pictures] + [(TWO_IMAGES, pictures[:2])]
    with reduce_tokens(small_next.model, method, 16):
        answers = small_next.ask(prompts, 3)
    for (text, of_prompt), answer in zip(prompts, answers, strict=True):
        shown = []
        for image in of_prompt:
            entering = len(reference.features(image, in_tower))
            shown.append(Shown(image, in_tower, left(in_decoder, entering, 16)))
        check_decoder(reference, in_decoder, text, shown, answer)


def test_the_check_can_fail(small_hf: HfLlava, small_folder: Path, images: list[Image.Image]) -> None:
    """Negative control: one token more is noticed, in the tower and in the decoder."""
    dense, decoder = DenseLlava(small_folder), ReferenceDecoder(small_folder)
    dense.method, dense.settings = "ficoco-v", {}
    with reduce_tokens(small_hf.model, "ficoco-v", 16):
        ((_, logprobs),) = small_hf.ask([(PROMPT, images[:1])], 1)
    assert (logprobs - dense.generate(PROMPT, [(images[0], 17)], 1)[1]).abs().max() > 10 * TOLERANCE
    with reduce_tokens(small_hf.model, "ficoco-l", 16):
        ((tokens, logprobs),) = small_hf.ask([(PROMPT, images[:1])], 1)
    shown = Shown(images[0], 144, left("ficoco-l", 144, 17))
    assert (logprobs - decoder.judge("ficoco-l", PROMPT, [shown], tokens)).abs().max() > 10 * TOLERANCE


def test_kept_patches(small_hf: HfLlava, images: list[Image.Image]) -> None:
    """TopK keeps patches; the kept ones are those whose features are the unreduced ones."""
    inputs = small_hf.inputs([(PROMPT, images[:1])])
    model = small_hf.model
    with torch.no_grad():
        whole = model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        with reduce_tokens(model, "topk-cls", 16) as reduction:
            (image,) = model.get_image_features(inputs["pixel_values"]).pooler_output
            model(**inputs)
    torch.testing.assert_close(image.tokens, whole[image.patch])
    assert torch.equal(reduction.kept[0], image.patch)
