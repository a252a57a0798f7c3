"""Every vision-side method is served as defined, by the server's settings or a request's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from vllm import LLM
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.method import SITES
from tests.models.checks import assert_together_equals_alone
from tests.reference.dense_tower import DenseLlava
from tests.support.engine import PROMPT, Engines, ask, request
from tests.support.hugging_face import HfLlava

# float32 against float64, see test_reference.py
TOLERANCE = 1e-4
VISION = [*available("encoder"), *available("features")]
SERVED = [name for name in VISION if get(name).required_signals() <= SITES[get(name).site]]
# The others are in test_question.py.
WITHOUT_QUESTION = [name for name in SERVED if "text_relevance" not in get(name).required_signals()]
COMPOSED: list[dict[str, Any]] = [
    {"filter": "cls_attention", "correlate": "key_cosine", "compress": "quantile_merge", "epsilon": 0.99},
    {"attention": "logits"},
    {"proportional_attention": True, "schedule": "geometric", "start_layer": 2},
]

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def engine(engines: Engines, random_llava: Path) -> LLM:
    return engines.get(random_llava, {"method": "ficoco-v", "keep": 64})


@pytest.fixture(scope="module")
def reference(random_llava: Path) -> DenseLlava:
    return DenseLlava(random_llava)


@pytest.fixture(scope="module")
def hugging_face(random_llava: Path) -> HfLlava:
    return HfLlava(random_llava)


@pytest.mark.parametrize("method", WITHOUT_QUESTION)
def test_served_as_defined(
    engine: LLM, reference: DenseLlava, hugging_face: HfLlava, images: list[Image.Image], method: str
) -> None:
    """As the oracle and transformers compute it."""
    reference.method, reference.settings = method, {}
    # In image 1 PruMerge+ meets two neighbours whose cosines differ by 1.6e-7, less than float32's keys are off by.
    image = images[3 if method == "prumerge-plus" else 1]
    with reduce_tokens(hugging_face.model, method, 64):
        ((tokens, logprobs),) = hugging_face.ask([(PROMPT, [image])], 3)
    (answer,) = ask(engine, [request(PROMPT, [image], ficoco_method=method, ficoco_keep=64)], 3)
    assert answer.tokens == tokens
    torch.testing.assert_close(answer.logprobs, logprobs, atol=TOLERANCE, rtol=0)
    for keep in (192, 64):
        (answer,) = ask(engine, [request(PROMPT, [image], ficoco_method=method, ficoco_keep=keep)], 3)
        tokens, logprobs = reference.generate(PROMPT, [(image, keep)], 3)
        assert answer.num_prompt_tokens == keep + len(engine.get_tokenizer()(PROMPT).input_ids) - 1
        assert answer.tokens == tokens
        torch.testing.assert_close(answer.logprobs.double(), logprobs, atol=TOLERANCE, rtol=0)


def test_all_methods_in_one_step_equal_each_alone(engine: LLM, images: list[Image.Image]) -> None:
    requests = [
        request(PROMPT, [images[index % len(images)]], ficoco_method=method, ficoco_keep=(64, 100)[index % 2])
        for index, method in enumerate(SERVED)
    ]
    assert_together_equals_alone(engine, requests, 3)


@pytest.mark.parametrize("method", sorted({*available(), "magic"} - set(SERVED)))
def test_what_cannot_be_served_is_refused(engine: LLM, images: list[Image.Image], method: str) -> None:
    with pytest.raises(VLLMValidationError, match=f"ficoco_method = '{method}'"):
        ask(engine, [request(PROMPT, [images[0]], ficoco_method=method)])
    (answer,) = ask(engine, [request(PROMPT, [images[0]])], 1)
    assert answer.tokens


def test_a_trace_is_for_servers_that_explain(engine: LLM, images: list[Image.Image]) -> None:
    with pytest.raises(VLLMValidationError, match="ficoco_trace is not a field of this server"):
        ask(engine, [request(PROMPT, [images[0]], ficoco_trace=1)])
    with pytest.raises(NotImplementedError):
        engine.collective_rpc("ficoco_take_trace", args=(1,))


@pytest.mark.parametrize("settings", COMPOSED, ids=["composed", "logits", "proportional"])
def test_settings_and_composition(
    engines: Engines,
    random_llava: Path,
    reference: DenseLlava,
    images: list[Image.Image],
    settings: dict[str, Any],
) -> None:
    """Stages exchanged by name, and settings that the tower reads."""
    engine = engines.get(random_llava, {"method": "ficoco-v", "keep": 64, **settings})
    (answer,) = ask(engine, [request(PROMPT, [images[3]])], 3)
    reference.method, reference.settings = "ficoco-v", settings
    tokens, logprobs = reference.generate(PROMPT, [(images[3], 64)], 3)
    assert answer.tokens == tokens
    torch.testing.assert_close(answer.logprobs.double(), logprobs, atol=TOLERANCE, rtol=0)
