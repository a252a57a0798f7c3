"""Without settings, and with all tokens kept, we are stock vLLM, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.support.compare import assert_equal, demo_questions
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.subprocess_engine import answers

pytestmark = pytest.mark.engine

REQUESTS: list[tuple[str, list[int], dict[str, Any]]] = [
    (PROMPT, [0], {}),
    (TEXT_ONLY, [], {}),
    (TWO_IMAGES, [1, 2], {}),
    (PROMPT, [3], {}),
]


@pytest.fixture(scope="module")
def stock(
    tmp_path_factory: pytest.TempPathFactory, demo_model: Path, images: list[Image.Image]
) -> dict[str, Any]:
    """Answers of vLLM without any plugin."""
    folder = tmp_path_factory.mktemp("stock")
    return answers(folder, demo_model, images, REQUESTS, environment={"VLLM_PLUGINS": ""}, dtype="bfloat16")


@pytest.mark.parametrize(
    "ficoco", [None, {"method": "ficoco-v", "keep": 576}], ids=["no settings", "keep all"]
)
def test_equals_stock_bit_for_bit(
    stock: dict[str, Any],
    tmp_path: Path,
    demo_model: Path,
    images: list[Image.Image],
    ficoco: dict[str, Any] | None,
) -> None:
    ours = answers(tmp_path, demo_model, images, REQUESTS, ficoco=ficoco, dtype="bfloat16")
    assert stock["model_class"] == "vllm.model_executor.models.llava.LlavaForConditionalGeneration"
    assert ours["model_class"] == "ficoco_vllm.models.llava.FicocoLlava"
    for (tokens, length, logprobs), expected in zip(ours["answers"], stock["answers"], strict=True):
        assert (tokens, length) == expected[:2]
        assert torch.equal(logprobs, expected[2])


def test_a_reduction_is_told_apart(
    stock: dict[str, Any], tmp_path: Path, demo_model: Path, images: list[Image.Image]
) -> None:
    """Negative control of the check above."""
    ours = answers(tmp_path, demo_model, images, REQUESTS, ficoco={"keep": 575}, dtype="bfloat16")
    assert not torch.equal(ours["answers"][0][2], stock["answers"][0][2])
    assert torch.equal(ours["answers"][1][2], stock["answers"][1][2])  # text only


def test_two_tensor_parallel_workers_equal_one(tmp_path: Path, demo_model: Path) -> None:
    """Each worker sees half of the heads; both must remove the same tokens."""
    questions = demo_questions()
    images = [image for _, image in questions]
    requests: list[tuple[str, list[int], dict[str, Any]]] = [
        (text, [index], {"ficoco_keep": keep})
        for keep in (64, 9)
        for index, (text, _) in enumerate(questions)
    ]
    requests.append((TEXT_ONLY, [], {}))
    one = answers(tmp_path / "one", demo_model, images, requests, ficoco={"keep": 64})
    two = answers(
        tmp_path / "two",
        demo_model,
        images,
        requests,
        ficoco={"keep": 64},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        environment={"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1"},
    )
    for answer, expected in zip(two["answers"], one["answers"], strict=True):
        assert answer[1] == expected[1]
        assert_equal(answer[0], answer[2], expected[0], expected[2], ends=True)
