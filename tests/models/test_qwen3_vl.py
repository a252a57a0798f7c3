"""Qwen3-VL with random weights: methods as defined, stock where all tokens stay, positions, images that are shrunk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from vllm import LLM
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange

from ficoco_vllm.models.qwen3_vl import FicocoQwen3VL
from ficoco_vllm.models.verify import _check_positions
from ficoco_vllm.vision.mrope import CHANNELS, put_places, with_places, without_places
from tests.models.checks import assert_together_equals_alone, use_head_by_head
from tests.reference.qwen3_vl import ReferenceQwen
from tests.support.engine import Answers, Engines, Question, ask, ask_all, request
from tests.support.pictures import noise
from tests.support.random_qwen import (
    IMAGE,
    LEAST_UNITS,
    MERGE,
    MOST_UNITS,
    PATCH,
    VIDEO,
    VISION_END,
    VISION_START,
)
from tests.support.subprocess_engine import answers

# float32 against float64
TOLERANCE = 1e-4
PICTURE = f"{VISION_START}{IMAGE}{VISION_END}"
PROMPT = f"<|im_start|>user\n{PICTURE}what is it?<|im_end|>\n<|im_start|>assistant\n"
TWO = f"<|im_start|>user\n{PICTURE}or {PICTURE}which?<|im_end|>\n<|im_start|>assistant\n"
TEXT = "<|im_start|>user\nis it red?<|im_end|>\n<|im_start|>assistant\n"
# Width and height to rows and columns of units: scaled to whole units, too small, too large, a single column.
GRIDS = {
    (192, 192): (12, 12),
    (300, 200): (10, 15),
    (30, 20): (2, 3),
    (192, 400): (18, 8),
    (20, 333): (21, 1),
}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return noise(list(GRIDS), seed=0)


@pytest.fixture(scope="module")
def engine(engines: Engines, random_qwen: Path) -> LLM:
    """Its own budget removes nothing, so that it schedules as stock vLLM does."""
    return engines.get(random_qwen, {"method": "ficoco-v", "keep": MOST_UNITS})


@pytest.fixture(scope="module")
def reference(random_qwen: Path) -> ReferenceQwen:
    return ReferenceQwen(random_qwen)


def check(
    engine: LLM,
    reference: ReferenceQwen,
    prompt: str,
    images: list[Image.Image],
    keeps: list[int],
    **budget: Any,
) -> None:
    """The answer is the oracle's, and its prompt as long as the budget says."""
    (answer,) = ask(engine, [request(prompt, images, **budget)], 3)
    tokens, logprobs = reference.generate(prompt, list(zip(images, keeps, strict=True)), 3)
    num_text = len(engine.get_tokenizer()(prompt).input_ids) - len(images)
    assert answer.num_prompt_tokens == num_text + sum(keeps)
    assert answer.tokens == tokens
    torch.testing.assert_close(answer.logprobs.double(), logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.compat
@pytest.mark.engine
@pytest.mark.proves(family="Qwen3-VL", site="tower")
@pytest.mark.parametrize(
    "method", ["ficoco-v", "tome", "evit", "topk-cls", "divprune", "visionzip", "spatial-pool", "prumerge"]
)
def test_served_as_defined(
    engine: LLM, reference: ReferenceQwen, images: list[Image.Image], method: str
) -> None:
    reference.method = None if method == "ficoco-v" else method
    check(engine, reference, PROMPT, images[1:2], [20], ficoco_method=method, ficoco_keep=20)


@pytest.mark.engine
@pytest.mark.parametrize("keep", [1, 9, 100])
def test_awkward_images_and_budgets(
    engine: LLM, reference: ReferenceQwen, images: list[Image.Image], keep: int
) -> None:
    """Two images in a prompt; one that has no more units than the budget keeps them all."""
    reference.method = None
    for pair in ([1, 2], [4, 3]):
        chosen = [images[index] for index in pair]
        keeps = [min(keep, rows * columns) for rows, columns in (reference.grid(image) for image in chosen)]
        check(engine, reference, TWO, chosen, keeps, ficoco_keep=keep)


@pytest.mark.engine
@pytest.mark.parametrize("method", ["ficoco-v", "divprune"])
def test_attention_head_by_head(
    engine: LLM,
    reference: ReferenceQwen,
    images: list[Image.Image],
    method: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In every layer, as on a CPU with fast products of bfloat16; here in float32, which rounds as the oracle needs."""
    layers = use_head_by_head(monkeypatch, "ficoco_vllm.vision.qwen3_vl_tower")
    reference.method = None if method == "ficoco-v" else method
    check(engine, reference, PROMPT, images[:1], [21], ficoco_method=method, ficoco_keep=21)
    assert len(layers) == 6


@pytest.mark.engine
@pytest.mark.long
def test_videos_are_left_alone(
    engines: Engines, engine: LLM, random_qwen: Path, images: list[Image.Image]
) -> None:
    """Beside an image that keeps all tokens, too: as without our settings, bit for bit."""
    frames = np.stack([np.array(image.resize((96, 64))) for image in images[:4]])
    known = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    video = (frames, {**known, "video_backend": "opencv", "do_sample_frames": False})
    clip = f"{VISION_START}{VIDEO}{VISION_END}"
    requests: list[dict[str, Any]] = [
        {"prompt": f"{TEXT}{clip}and then?", "multi_modal_data": {"video": [video]}},
        {
            "prompt": f"{TEXT}{PICTURE}or {clip}which?",
            "multi_modal_data": {"video": [video], "image": [images[1]]},
        },
    ]
    ours = ask(engine, requests, 3)
    stock = ask(engines.get(random_qwen, None), requests, 3)
    for answer, expected in zip(ours, stock, strict=True):
        assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
        assert torch.equal(answer.logprobs, expected.logprobs)


@pytest.mark.engine
def test_a_share_of_the_units(engine: LLM, reference: ReferenceQwen, images: list[Image.Image]) -> None:
    reference.method = None
    check(engine, reference, TWO, [images[0], images[2]], [36, 2], ficoco_keep_ratio=0.25)


@pytest.mark.engine
def test_together_equals_alone(engine: LLM, images: list[Image.Image]) -> None:
    """Grids, budgets and methods of one step."""
    requests = [
        request(PROMPT, [images[index % 5]], ficoco_method=method, ficoco_keep=(20, 30)[index % 2])
        for index, method in enumerate(["ficoco-v", "divprune", "tome", "ficoco-v", "ficoco-v", "downscale"])
    ]
    requests += [request(PROMPT, [images[0]], ficoco_keep=MOST_UNITS), {"prompt": TEXT}]
    assert_together_equals_alone(engine, requests, 3)


@pytest.mark.engine
def test_chunks_and_cached_prefixes(engine: LLM, images: list[Image.Image]) -> None:
    """More tokens than a step has, so that an image is split; then the same again, from the cache."""
    requests = [request(TWO, [images[0], images[1]], ficoco_keep=keep) for keep in range(90, 104)]
    engine.reset_prefix_cache()
    together, again = ask(engine, requests, 3), ask(engine, requests, 3)
    for one, *answers_of_one in zip(requests, together, again, strict=True):
        engine.reset_prefix_cache()
        (alone,) = ask(engine, [one], 3)
        for answer in answers_of_one:
            assert answer.tokens == alone.tokens
            torch.testing.assert_close(answer.logprobs, alone.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.engine
@pytest.mark.compat
def test_all_tokens_kept_equals_stock_bit_for_bit(
    tmp_path: Path, engine: LLM, random_qwen: Path, images: list[Image.Image]
) -> None:
    """Also where nothing needs to be shrunk."""
    plain: list[Question] = [(PROMPT, [0], {}), (TEXT, [], {}), (TWO, [1, 2], {}), (PROMPT, [4], {})]
    stock: Answers = answers(tmp_path, random_qwen, images, plain, environment={"VLLM_PLUGINS": ""})
    assert stock.model_class == "vllm.model_executor.models.qwen3_vl.Qwen3VLForConditionalGeneration"
    for method in ("ficoco-v", "downscale"):
        budget = {"ficoco_keep": MOST_UNITS, "ficoco_method": method}
        engine.reset_prefix_cache()
        ours = ask_all(engine, images, [(text, index, budget if index else {}) for text, index, _ in plain])
        assert ours.model_class == "ficoco_vllm.models.qwen3_vl.FicocoQwen3VL"
        for answer, expected in zip(ours.answers, stock.answers, strict=True):
            assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
            assert torch.equal(answer.logprobs, expected.logprobs)


@pytest.mark.engine
def test_downscale_is_the_small_image(
    engine: LLM, reference: ReferenceQwen, images: list[Image.Image]
) -> None:
    """An image shrunk to 3 x 4 units answers as one that comes in that size; fewer units than stock allows, too."""
    processor = reference.processor.image_processor
    scaled = processor.resize(
        torch.from_numpy(np.array(images[1])).permute(2, 0, 1)[None],
        type(processor.size)(shortest_edge=1, longest_edge=15 * (PATCH * MERGE) ** 2),
        processor.resample,
        factor=PATCH * MERGE,
    )
    small = Image.fromarray(scaled[0].permute(1, 2, 0).numpy())
    assert small.size == (4 * PATCH * MERGE, 3 * PATCH * MERGE)
    shrunk, whole, tiny = ask(
        engine,
        [
            request(PROMPT, [images[1]], ficoco_method="downscale", ficoco_keep=15),
            request(PROMPT, [small], ficoco_keep=MOST_UNITS),
            request(PROMPT, [images[1]], ficoco_method="downscale", ficoco_keep=LEAST_UNITS - 1),
        ],
    )
    assert shrunk.num_prompt_tokens == whole.num_prompt_tokens == tiny.num_prompt_tokens + 12 - 2
    assert shrunk.tokens == whole.tokens
    torch.testing.assert_close(shrunk.logprobs, whole.logprobs, atol=TOLERANCE, rtol=0)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ficoco_keep": 0}, "ficoco_keep = 0 is not allowed; allowed: an integer from 1 to 160"),
        ({"ficoco_keep": 161}, "ficoco_keep = 161 is not allowed; allowed: an integer from 1 to 160"),
        (
            {"ficoco_keep_ratio": 0},
            "ficoco_keep_ratio = 0 is not allowed; allowed: a number above 0, at most 1",
        ),
        ({"ficoco_keep_ratio": "half"}, "ficoco_keep_ratio = 'half' is not allowed"),
        (
            {"ficoco_keep": 3, "ficoco_keep_ratio": 0.5},
            "ficoco_keep_ratio = 0.5 together with ficoco_keep = 3",
        ),
        ({"ficoco_method": "fastv"}, "ficoco_method = 'fastv' is not a method that this model can serve"),
        ({"max_pixels": 1024}, "max_pixels = 1024 in mm_processor_kwargs is not allowed"),
    ],
)
def test_refused(engine: LLM, images: list[Image.Image], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(VLLMValidationError, match=message):
        ask(engine, [request(PROMPT, [images[0]], **fields)])


@pytest.mark.parametrize(
    ("prunes", "stages", "message"),
    [
        (True, 1, "--video-pruning-rate is not allowed"),
        (False, 2, "--pipeline-parallel-size 2 is not allowed"),
    ],
)
def test_what_does_not_know_the_positions_is_refused(prunes: bool, stages: int, message: str) -> None:
    multimodal = SimpleNamespace(get_video_pruning_spec=lambda: ("evs", 0.5) if prunes else None)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(get_multimodal_config=lambda: multimodal),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
    )
    with pytest.raises(ValueError, match=message):
        _check_positions(config)


def positions(prompt: list[int], images: list[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions of a prompt whose images are at an offset and have rows and columns of units."""
    ids = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 3, "vision_end_token_id": 4}
    model: Any = object.__new__(FicocoQwen3VL)
    torch.nn.Module.__init__(model)
    model.planner = object()
    model.config = SimpleNamespace(**ids, vision_config=SimpleNamespace(spatial_merge_size=2))
    model.visual = SimpleNamespace(spatial_merge_size=2)
    features = []
    for offset, rows, columns in images:
        length = next(
            (index for index, token in enumerate(prompt[offset:]) if token != 5), len(prompt) - offset
        )
        data: Any = {"image_grid_thw": SimpleNamespace(data=torch.tensor([1, 2 * rows, 2 * columns]))}
        features.append(MultiModalFeatureSpec(data, "image", "", PlaceholderRange(offset, length)))
    result: tuple[Tensor, int] = model.get_mrope_input_positions(prompt, features)
    return result


def test_text_behind_an_image_keeps_its_positions() -> None:
    """A prompt with two images, of which 3 and 2 units stay, against the same prompt without reduction."""
    grids = [(4, 7), (2, 3)]
    whole = [9, 3, *[5] * 28, 4, 9, 9, 3, *[5] * 6, 4, 9]
    reduced = [9, 3, *[5] * 3, 4, 9, 9, 3, *[5] * 2, 4, 9]
    expected, delta = positions(whole, [(2, *grids[0]), (34, *grids[1])])
    given, other_delta = positions(reduced, [(2, *grids[0]), (9, *grids[1])])
    text = [index for index, token in enumerate(whole) if token != 5]
    is_text = torch.tensor([token != 5 for token in reduced])
    assert torch.equal(given[:, is_text], expected[:, text])
    assert len(whole) + delta == len(reduced) + other_delta
    # The tower says which units stay.
    kept = (torch.tensor([0, 13, 27]), torch.tensor([2, 4]))
    channels = torch.cat(
        [
            with_places(torch.zeros(len(unit), 8, dtype=torch.bfloat16), unit, columns)[:, -CHANNELS:]
            for unit, (_, columns) in zip(kept, grids, strict=True)
        ]
    )
    filled = put_places(given, (~is_text).nonzero()[:, 0], channels)
    stays = torch.cat([2 + kept[0], 34 + kept[1]])
    assert torch.equal(filled[:, ~is_text], expected[:, stays])
    assert torch.equal(filled[:, is_text], given[:, is_text])


def test_places_survive_sixteen_bits() -> None:
    """Rows and columns beyond 256, and tokens without a place of ours."""
    unit = torch.tensor([0, 70_001, 1800 * 1000 - 1])
    start = torch.full((3, 5), 7)
    for dtype in (torch.bfloat16, torch.float16):
        channels = with_places(torch.zeros(3, 4, dtype=dtype), unit, 1800)[:, -CHANNELS:]
        filled = put_places(start, torch.tensor([0, 2, 3]), channels)
        assert filled[1].tolist() == [7, 7, 7 + 38, 7 + 999, 7]
        assert filled[2].tolist() == [7, 7, 7 + 1601, 7 + 1799, 7]
    left = without_places(torch.zeros(2, 4))[:, -CHANNELS:]
    assert torch.equal(put_places(start, torch.tensor([1, 2]), left), start)
