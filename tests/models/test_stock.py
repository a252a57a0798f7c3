"""Without settings, and with all tokens kept, we are stock vLLM, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.compare import assert_equal, demo_questions
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES, Answers, Engines, Question, ask_all
from tests.support.subprocess_engine import answers

pytestmark = [pytest.mark.compat, pytest.mark.engine]

REQUESTS: list[Question] = [
    (PROMPT, [0], {}),
    (TEXT_ONLY, [], {}),
    (TWO_IMAGES, [1, 2], {}),
    (PROMPT, [3], {}),
]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, demo_model: Path, images: list[Image.Image]) -> Answers:
    """Answers of vLLM without any plugin."""
    folder = tmp_path_factory.mktemp("stock")
    return answers(folder, demo_model, images, REQUESTS, environment={"VLLM_PLUGINS": ""}, dtype="bfloat16")


@pytest.mark.parametrize(
    "ficoco", [None, {"method": "ficoco-v", "keep": 576}], ids=["no settings", "keep all"]
)
def test_equals_stock_bit_for_bit(
    stock: Answers,
    engines: Engines,
    demo_model: Path,
    images: list[Image.Image],
    ficoco: dict[str, Any] | None,
) -> None:
    ours = ask_all(engines.get(demo_model, ficoco, dtype="bfloat16"), images, REQUESTS)
    assert stock.model_class == "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
    assert ours.model_class == "ficoco_vllm.models.llava.FicocoLlava"
    for answer, expected in zip(ours.answers, stock.answers, strict=True):
        assert (answer.tokens, answer.num_prompt_tokens) == (expected.tokens, expected.num_prompt_tokens)
        assert torch.equal(answer.logprobs, expected.logprobs)


def test_a_reduction_is_detected(
    stock: Answers, engines: Engines, demo_model: Path, images: list[Image.Image]
) -> None:
    """Negative control of the check above."""
    ours = ask_all(engines.get(demo_model, {"keep": 575}, dtype="bfloat16"), images, REQUESTS)
    assert not torch.equal(ours.answers[0].logprobs, stock.answers[0].logprobs)
    assert torch.equal(ours.answers[1].logprobs, stock.answers[1].logprobs)  # text only


@pytest.mark.long
def test_two_tensor_parallel_workers_equal_one(engines: Engines, tmp_path: Path, demo_model: Path) -> None:
    """Each worker sees half of the heads; both must remove the same tokens."""
    questions = demo_questions()
    images = [image for _, image in questions]
    requests: list[Question] = [
        (text, [index], {"ficoco_keep": keep})
        for keep in (64, 9)
        for index, (text, _) in enumerate(questions)
    ]
    requests.append((TEXT_ONLY, [], {}))
    one = ask_all(engines.get(demo_model, {"keep": 64}), images, requests)
    two = answers(
        tmp_path,
        demo_model,
        images,
        requests,
        ficoco={"keep": 64},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
    )
    for answer, expected in zip(two.answers, one.answers, strict=True):
        assert answer.num_prompt_tokens == expected.num_prompt_tokens
        assert_equal(answer.tokens, answer.logprobs, expected.tokens, expected.logprobs, ends=True)
