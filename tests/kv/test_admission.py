"""Requests are checked against the settings that the server was started with."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from vllm.exceptions import VLLMValidationError
from vllm.v1.engine import EngineCoreRequest

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.kv.admission import ChatBudgets, check_request, check_stop, fill_budget, fill_windows

pytestmark = pytest.mark.compat


def config(**ficoco: Any) -> Any:
    """A vLLM configuration with our settings on the model's."""
    hf_config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=48, patch_size=8, num_hidden_layers=4),
        text_config=LlamaConfig(num_hidden_layers=8),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    hf_config.ficoco = ficoco
    return SimpleNamespace(model_config=SimpleNamespace(hf_config=hf_config), use_v2_model_runner=False)


def request(
    extra: dict[str, Any] | None = None,
    num_tokens: int = 50,
    resumable: bool = False,
    modality: str = "image",
    **params: Any,
) -> Any:
    """One image of 36 tokens after four of text."""
    position = SimpleNamespace(offset=4, length=36)
    result = {"extra_args": extra, "prompt_logprobs": None, **params}
    return SimpleNamespace(
        sampling_params=SimpleNamespace(**result),
        mm_features=[SimpleNamespace(mm_position=position, identifier="an image", modality=modality)],
        prompt_token_ids=[0] * num_tokens,
        resumable=resumable,
    )


@pytest.mark.parametrize(
    "ficoco", [{}, {"method": "ficoco-v"}, {"method": "ficoco-l"}, {"method": "ficoco-vl"}]
)
def test_plain_requests_pass(ficoco: dict[str, Any]) -> None:
    check_request(config(**ficoco), request())
    check_request(config(**ficoco), SimpleNamespace(sampling_params=None))


def test_xargs_of_the_decoder_are_refused_by_a_server_that_reduces_in_the_tower() -> None:
    with pytest.raises(VLLMValidationError, match=r"ficoco_keep in vllm_xargs .* mm_processor_kwargs"):
        check_request(config(method="ficoco-v"), request({"ficoco_keep": 9}))


@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l"])
def test_the_field_of_bodies_is_no_argument_of_the_decoder(method: str) -> None:
    for value in ({"keep": 4}, "off"):
        with pytest.raises(VLLMValidationError, match=r"^ficoco .* ficoco_keep"):
            check_request(config(method=method), request({"ficoco": value}))


def test_integers_of_numpy_go_to_the_engine_as_python_s() -> None:
    asked = request({"ficoco_keep": np.int64(9), "other": 1})
    check_request(config(method="ficoco-l"), asked)
    assert asked.sampling_params.extra_args == {"ficoco_keep": 9, "other": 1}
    assert type(asked.sampling_params.extra_args["ficoco_keep"]) is int


@pytest.mark.parametrize(
    ("requested", "part"),
    [
        (request({"ficoco_keep": 37}), "ficoco_keep = 37"),
        (request(num_tokens=40), "ends in an image"),
        (request(prompt_logprobs=0), "prompt_logprobs = 0"),
        (request(prompt_logprob_token_ids=[[1]]), "prompt_logprobs"),
        (request(resumable=True), "arrives in pieces"),
        (request(modality="video"), "a video is not allowed .* or ficoco_keep = 36"),
    ],
)
def test_refusals(requested: Any, part: str) -> None:
    with pytest.raises(VLLMValidationError, match=part):
        check_request(config(method="ficoco-l", keep=4), requested)


def test_what_is_not_reduced_may_do_all_of_it() -> None:
    kept = request({"ficoco_keep": 36}, num_tokens=40, resumable=True, prompt_logprobs=1)
    check_request(config(method="ficoco-l"), kept)
    check_request(config(method="ficoco-l"), request({"ficoco_keep": 36}, modality="video"))


def test_the_engines_request_says_whether_more_will_come() -> None:
    assert "resumable" in EngineCoreRequest.__struct_fields__


TURN = FicocoConfig.parse({"method": "ficoco-l", "windows": "turn"})


def chat(num_tokens: int, marker_at: int | None = None, extra: dict[str, Any] | None = None) -> Any:
    """A prompt with the generation prompt 7, 8 at a position."""
    requested = request(extra, num_tokens)
    if marker_at is not None:
        requested.prompt_token_ids[marker_at : marker_at + 2] = [7, 8]
    fill_windows(TURN, [7, 8], requested)
    return requested


def test_windows_are_filled_in_unless_the_request_names_them() -> None:
    assert chat(60, 48).sampling_params.extra_args == {"ficoco_window": [50]}
    assert chat(60).sampling_params.extra_args == {"ficoco_window": [60]}
    assert chat(60, 48, {"ficoco_window": 55}).sampling_params.extra_args == {"ficoco_window": 55}
    off = request()
    fill_windows(FicocoConfig.parse({"method": "ficoco-l"}), [7, 8], off)
    assert off.sampling_params.extra_args is None
    check_request(config(method="ficoco-l", windows="turn"), chat(60, 48))


def test_a_chat_keeps_the_budget_of_its_first_turn() -> None:
    """The default follows the load; a budget that changes would miss the cached window."""
    chats, load = ChatBudgets(most=2), iter(range(20, 0, -1))

    def keep(requested: Any) -> int:
        fill_budget(lambda method, most: next(load), chats, requested)
        return int(requested.sampling_params.extra_args["ficoco_keep"])

    assert keep(chat(50, 48)) == 20
    assert keep(chat(70, 48)) == 20  # the second turn
    assert keep(chat(70, 52)) == 19  # another question
    assert keep(chat(70, 48, {"ficoco_method": "fastv"})) == 18
    # The first chat was used least lately and is forgotten.
    assert keep(chat(90, 52)) == 19
    assert keep(chat(90, 48)) == 17
    assert len(chats.keeps) == 2


@pytest.mark.parametrize("extra", [{"ficoco_window": 51}, {"ficoco_window": "end"}])
def test_windows_that_are_refused_name_the_field(extra: dict[str, Any]) -> None:
    with pytest.raises(VLLMValidationError, match="ficoco_window") as caught:
        check_request(config(method="ficoco-l", windows="turn"), request(extra))
    assert caught.value.parameter == "ficoco_window"


def test_windows_that_no_step_holds_are_refused() -> None:
    """Those that a request names; text that goes on ends a window where the step does."""
    settings = {"method": "ficoco-l", "windows": "turn", "window_tokens": 40}
    with pytest.raises(VLLMValidationError, match=r"tokens 4 to 49 .* are 46; allowed: 40") as caught:
        check_request(config(**settings), request({"ficoco_window": 50}))
    assert caught.value.parameter == "ficoco_window"
    unnamed = request()
    fill_windows(FicocoConfig.parse(settings), [], unnamed)
    check_request(config(**settings), unnamed)


def test_traced_requests_pass_over_the_cache() -> None:
    requested = request({"ficoco_trace": 3})
    check_request(config(method="ficoco-l", windows="turn", explain=True), requested)
    assert requested.sampling_params.skip_reading_prefix_cache


def test_stop_strings_must_be_text() -> None:
    check_stop(request(stop=["a", "\N{SNOWMAN}"]))
    check_stop(request(stop=None))
    check_stop(SimpleNamespace(sampling_params=None))
    with pytest.raises(VLLMValidationError, match="stop cannot be encoded as UTF-8: surrogates") as caught:
        check_stop(request(stop=["a\ud800"]))
    assert caught.value.parameter == "stop"
