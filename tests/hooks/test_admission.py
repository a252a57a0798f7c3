"""Admission of requests between vLLM's input processor and the engine."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine.input_processor import InputProcessor

from ficoco_vllm.hooks import admission
from ficoco_vllm.hooks.admission import FrontEnd, hook_admission
from ficoco_vllm.request_fields import KEEP
from tests.kv.test_admission import config, request

pytestmark = pytest.mark.compat


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An input processor that turns everything into a request with an image of 36 tokens."""
    monkeypatch.setattr(InputProcessor, "process_inputs", lambda self, request_id, prompt, params: params)
    hook_admission()
    made = InputProcessor.__new__(InputProcessor)
    made.vllm_config = config(method="ficoco-l")
    made.renderer = SimpleNamespace(mm_processor_cache=None)
    setattr(made, "ficoco", FrontEnd(None))  # noqa: B010 (vLLM's class does not declare it)
    return made


def test_hooked_once(processor: Any) -> None:
    hooked = InputProcessor.process_inputs
    hook_admission()
    assert InputProcessor.process_inputs is hooked


def test_the_default_budget_is_filled_in_then_bounds_are_checked(processor: Any) -> None:
    seen = []
    state = FrontEnd.of(processor)
    state.default_keep = lambda method, most: most - 30
    state.bounds = lambda extra_args, most: seen.append((dict(extra_args), most))
    admitted = processor.process_inputs("id", {}, request())
    assert admitted.sampling_params.extra_args == {KEEP: 6}
    assert seen == [({KEEP: 6}, 36)]


def test_videos_are_not_counted_as_images(processor: Any) -> None:
    """The tower does not see their tokens, so a saving would be negative."""
    counted = []
    FrontEnd.of(processor).counter = SimpleNamespace(
        request=lambda prompt, images, extra_args: counted.append(images)
    )
    for modality in ("video", "image"):
        admitted = request({KEEP: 36}, modality=modality)
        processor.process_inputs("id", {}, admitted)
    assert counted == [[], [(4, 36)]]


def test_refusals_are_counted(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(admission, "count_refusal", counted.append)
    with pytest.raises(VLLMValidationError, match=f"{KEEP} = 37"):
        processor.process_inputs("id", prompt={}, params=request({KEEP: 37}))

    def refuse(extra_args: Any, most: int) -> None:
        raise ValueError(f"{KEEP} = 1 is not allowed")

    FrontEnd.of(processor).bounds = refuse
    with pytest.raises(VLLMValidationError, match=f"{KEEP} = 1") as caught:
        processor.process_inputs("id", {}, request())
    assert caught.value.parameter == KEEP
    assert counted == [processor.vllm_config.model_config] * 2


def test_an_admitted_request_is_counted_by_its_parameters(processor: Any) -> None:
    counter: Any = SimpleNamespace(request=lambda *arguments: arguments)
    FrontEnd.of(processor).counter = counter
    prompt = {"ficoco_budget": "budget", "ficoco_sizes": ((48, 48),)}
    admitted = processor.process_inputs("id", prompt, request({KEEP: 9}))
    assert admitted.sampling_params.ficoco == (prompt, [(4, 36)], {KEEP: 9})
