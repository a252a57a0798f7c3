"""InternVL as served, in both formats, against each tile reduced plainly on Hugging Face's model, in float64."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from tests.models.checks import assert_images_equal, assert_together_equals_alone, use_head_by_head
from tests.reference.internvl import ReferenceInternVL
from tests.reference.internvl_chat import ReferenceInternVLChat
from tests.support.compare import NUM_TOKENS, TOLERANCE, assert_equal
from tests.support.engine import PROMPT as PLAIN_PROMPT
from tests.support.engine import TEXT_ONLY, Answers, Engines, Question, ask, ask_all, request
from tests.support.engine import TWO_IMAGES as PLAIN_TWO_IMAGES
from tests.support.pictures import noise
from tests.support.random_internvl import IMAGE, UNITS
from tests.support.random_internvl_chat import PLACEHOLDER
from tests.support.subprocess_engine import answers

pytestmark = [pytest.mark.compat, pytest.mark.engine]

# Width and height; tiles are 96 pixels wide. One tile; four, six and three with a thumbnail; a line of pixels; tiny.
SIZES = [(96, 96), (192, 192), (300, 200), (40, 300), (700, 3), (10, 10), (97, 191)]


@dataclass(frozen=True)
class Format:
    """A format of InternVL checkpoints.

    Attributes:
        model: name of the fixture of a checkpoint.
        reference: class of the oracle.
        image: in prompts.
        stock: class in vLLM.
        served: class of ours.
        refused: `mm_processor_kwargs` that would change the number of tiles, and what the refusal says.
        options: of its engines.
    """

    model: str
    reference: type[ReferenceInternVL]
    image: str
    stock: str
    served: str
    refused: list[tuple[dict[str, Any], str]]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def prompt(self) -> str:
        """With one image."""
        return PLAIN_PROMPT.replace("<image>", self.image)

    @property
    def two_images(self) -> str:
        """With two images."""
        return PLAIN_TWO_IMAGES.replace("<image>", self.image)


FORMATS = {
    "hf": Format(
        "random_internvl",
        ReferenceInternVL,
        IMAGE,
        "vllm.model_executor.models.interns1.InternS1ForConditionalGeneration",
        "ficoco_vllm.models.internvl.FicocoInternVL",
        [
            ({"max_patches": 2}, "max_patches = 2 in mm_processor_kwargs is not allowed .* allowed: 6"),
            ({"images_kwargs": {"crop_to_patches": False}}, "crop_to_patches = False in mm_processor_kwargs"),
        ],
    ),
    "opengvlab": Format(
        "random_internvl_chat",
        ReferenceInternVLChat,
        PLACEHOLDER,
        "vllm.model_executor.models.internvl.InternVLChatModel",
        "ficoco_vllm.models.internvl_chat.FicocoInternVLChat",
        [
            ({"max_dynamic_patch": 2}, "max_dynamic_patch = 2 in mm_processor_kwargs is .* allowed: 6"),
            ({"min_dynamic_patch": 2}, "min_dynamic_patch = 2 in mm_processor_kwargs is .* allowed: 1"),
            ({"dynamic_image_size": False}, "dynamic_image_size = False in mm_processor_kwargs"),
            ({"use_thumbnail": False}, "use_thumbnail = False in mm_processor_kwargs"),
            ({"image_size": 48}, "image_size = 48 in mm_processor_kwargs is not allowed .* allowed: 96"),
        ],
        {"trust_remote_code": True},
    ),
}


@pytest.fixture(scope="module", params=["hf", pytest.param("opengvlab", marks=pytest.mark.long)])
def form(request: pytest.FixtureRequest) -> Format:
    """Each of them."""
    return FORMATS[request.param]


@pytest.fixture(scope="module")
def folder(form: Format, request: pytest.FixtureRequest) -> Path:
    """The checkpoint."""
    return request.getfixturevalue(form.model)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Noise."""
    return noise(SIZES, seed=1)


@pytest.fixture(scope="module")
def engine(engines: Engines, form: Format, folder: Path) -> LLM:
    """FiCoCo-V with 9 tokens a tile."""
    return engines.get(folder, {"method": "ficoco-v", "keep": 9}, **form.options)


@pytest.fixture(scope="module")
def reference(form: Format, folder: Path) -> ReferenceInternVL:
    """The float64 oracle on the same weights."""
    return form.reference(folder)


@pytest.mark.proves(family="InternVL3", site="tower")
@pytest.mark.proves(family="InternVL3, OpenGVLab's format", site="tower")
@pytest.mark.parametrize("keep", [UNITS, UNITS - 1, 16, 4, 1])
def test_equals_reference(
    engine: LLM, reference: ReferenceInternVL, form: Format, pictures: list[Image.Image], keep: int
) -> None:
    assert_images_equal(engine, reference, form.prompt, pictures, keep)


@pytest.mark.parametrize(
    ("method", "head_by_head"),
    [
        ("tome", False),
        ("evit", False),
        ("topk-cls", False),
        ("visionzip", False),
        ("divprune", False),
        ("divprune", True),
        ("ficoco-v", True),
    ],
)
def test_methods_equal_reference(
    engine: LLM,
    reference: ReferenceInternVL,
    form: Format,
    pictures: list[Image.Image],
    method: str,
    head_by_head: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Merging with weights, fused units without a place, selection on the features.

    Attention head by head, as CPUs with fast products of bfloat16 have it, is taken here in float32.
    """
    monkeypatch.setattr(reference, "method", method)
    module = form.served.rpartition(".")[0]
    layers = use_head_by_head(monkeypatch, module) if head_by_head else []
    # Another budget, so that no cache has the tokens.
    keep = 7 if head_by_head else 9
    assert_images_equal(engine, reference, form.prompt, pictures, keep, ficoco_method=method)
    assert bool(layers) == head_by_head


def test_two_images_equal_reference(
    engine: LLM, reference: ReferenceInternVL, form: Format, pictures: list[Image.Image]
) -> None:
    """One tile, and six with a thumbnail."""
    (answer,) = ask(engine, [request(form.two_images, [pictures[0], pictures[2]])], NUM_TOKENS)
    tokens, logprobs = reference.generate(form.two_images, [(pictures[0], 9), (pictures[2], 9)], NUM_TOKENS)
    assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)


def test_batched_equals_alone(engine: LLM, form: Format, pictures: list[Image.Image]) -> None:
    """All sizes with three budgets, one of them all tokens, text between them, in one step."""
    requests = []
    for index, image in enumerate(pictures):
        requests.append(request(form.prompt, [image], ficoco_keep=(9, UNITS, 4)[index % 3]))
        if index % 3 == 0:
            requests.append(request(TEXT_ONLY))
    assert_together_equals_alone(engine, requests)


def test_the_check_can_fail(
    engine: LLM, reference: ReferenceInternVL, form: Format, pictures: list[Image.Image]
) -> None:
    """Negative control: one more token in each tile is detected."""
    (answer,) = ask(engine, [request(form.prompt, [pictures[1]])], 1)
    _, logprobs = reference.generate(form.prompt, [(pictures[1], 10)], 1)
    assert (answer.logprobs - logprobs).abs().max() > 10 * TOLERANCE


def test_refused(engine: LLM, form: Format, pictures: list[Image.Image]) -> None:
    for kwargs, message in [
        ({"ficoco_keep": UNITS + 1}, "ficoco_keep = 37 is not allowed; allowed: an integer from 1 to 36"),
        ({"ficoco_method": "evit", "ficoco_keep": 1}, "ficoco_keep = 1: "),
        *form.refused,
    ]:
        with pytest.raises(VLLMValidationError, match=message):
            ask(engine, [request(form.prompt, [pictures[0]], **kwargs)], 1)


def test_a_video_stays_whole(engine: LLM, form: Format, pictures: list[Image.Image]) -> None:
    """Two frames beside an image that is reduced: the prompt has all units of the frames."""
    frames = torch.stack([torch.full((96, 96, 3), value, dtype=torch.uint8) for value in (9, 200)])
    alone = {
        "prompt": "<s>USER: <video>\nhow many? ASSISTANT:",
        "multi_modal_data": {"video": [frames.numpy()]},
    }
    both = {
        "prompt": f"<s>USER: <video>\n{form.image}\nhow many? ASSISTANT:",
        "multi_modal_data": {"video": [frames.numpy()], "image": [pictures[1]]},
    }
    one, two = (ask(engine, [prompt], 1)[0].num_prompt_tokens for prompt in (alone, both))
    assert one > 2 * UNITS
    assert two - one == 5 * 9 + 3


def asked(form: Format, **kwargs: Any) -> list[Question]:
    """Each picture, text alone, and two pictures.

    Args:
        form: whose prompts they are.
        **kwargs: of the processor, for prompts with images.
    """
    alone: list[Question] = [(form.prompt, [index], kwargs) for index in range(len(SIZES))]
    return [*alone, (TEXT_ONLY, [], {}), (form.two_images, [1, 3], kwargs)]


@pytest.fixture(scope="module")
def stock(
    form: Format, folder: Path, pictures: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """Answers of vLLM without any plugin."""
    files = tmp_path_factory.mktemp("stock-internvl")
    environment = {"VLLM_PLUGINS": ""}
    return answers(files, folder, pictures, asked(form), environment=environment, **form.options)


@pytest.mark.parametrize("keep", [UNITS, UNITS - 1])
def test_equals_stock_bit_for_bit(
    stock: Answers, engine: LLM, form: Format, pictures: list[Image.Image], keep: int
) -> None:
    """With one token less in each tile the answers differ; otherwise the check could not fail."""
    ours = ask_all(engine, pictures, asked(form, ficoco_keep=keep))
    assert (stock.model_class, ours.model_class) == (form.stock, form.served)
    for (_, images, _), answer, expected in zip(asked(form), ours.answers, stock.answers, strict=True):
        reduced = keep < UNITS and images
        same = answer.tokens == expected.tokens and torch.equal(answer.logprobs, expected.logprobs)
        assert answer.num_prompt_tokens == expected.num_prompt_tokens or reduced
        assert same is not bool(reduced)


def test_settings_of_the_images(
    engines: Engines, random_internvl_chat: Path, pictures: list[Image.Image]
) -> None:
    """Set at start-up: fewer tiles, no thumbnail."""
    form = FORMATS["opengvlab"]
    images = {"max_dynamic_patch": 4, "use_thumbnail": False}
    settings = {"method": "ficoco-v", "keep": 9}
    engine = engines.get(random_internvl_chat, settings, mm_processor_kwargs=images, **form.options)
    reference = ReferenceInternVLChat(random_internvl_chat)
    reference.images |= images
    assert [len(reference.pixels(picture)) for picture in pictures] == [1, 4, 4, 4, 4, 1, 2]
    assert_images_equal(engine, reference, form.prompt, pictures, 9)


@pytest.mark.long
def test_two_tensor_parallel_workers_equal_the_reference(
    random_internvl_chat: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """The norms of queries and keys are over all heads, which two workers share."""
    form = FORMATS["opengvlab"]
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", **form.options}
    questions: list[Question] = [(form.prompt, [index], {}) for index in (1, 3)]
    parallel = answers(
        tmp_path,
        random_internvl_chat,
        pictures,
        questions,
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
        ficoco={"method": "ficoco-v", "keep": 9},
        **options,
    )
    reference = ReferenceInternVLChat(random_internvl_chat)
    for (prompt, (index,), _), answer in zip(questions, parallel.answers, strict=True):
        tokens, logprobs = reference.generate(prompt, [(pictures[index], 9)], len(answer.tokens))
        assert_equal(answer.tokens, answer.logprobs, tokens, logprobs, ends=False)
