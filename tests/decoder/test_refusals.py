"""What cannot be served is refused: at start-up by the configuration, later by the request, never half answered."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from ficoco_vllm.decoder.verify import SCHEDULER, find_refusal
from tests.decoder import calls
from tests.decoder.calls import Ask
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.remote import Remote, remote_engine

FICOCO = {"method": "ficoco-l", "keep": 16}


def config(**changed: Any) -> Any:
    """As much of a vLLM configuration as the check reads, all of it allowed; `changed` by dotted path."""
    found = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=None, scheduler_cls=None, async_scheduling=None
        ),
        model_config=SimpleNamespace(
            enable_prompt_embeds=False,
            hf_config=SimpleNamespace(
                vision_feature_select_strategy="default",
                get_text_config=lambda: SimpleNamespace(model_type="llama"),
            ),
        ),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        use_v2_model_runner=True,
        _get_v2_model_runner_unsupported_features=lambda: ["a feature"],
    )
    for path, value in changed.items():
        *parents, name = path.split("__")
        target = found
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return found


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1"),
        ({"parallel_config__decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"parallel_config__use_ubatching": True}, "--enable-dbo"),
        ({"speculative_config": object()}, "--speculative-config"),
        ({"kv_transfer_config": object()}, "--kv-transfer-config"),
        ({"lora_config": object()}, "--enable-lora"),
        ({"model_config__enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"scheduler_config__disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"scheduler_config__scheduler_cls": "other.Scheduler"}, "--scheduler-cls other.Scheduler"),
        ({"scheduler_config__async_scheduling": False}, "--no-async-scheduling"),
        ({"model_config__hf_config__vision_feature_select_strategy": "full"}, "'full'"),
        (
            {"model_config__hf_config__get_text_config": lambda: SimpleNamespace(model_type="mistral")},
            "'mistral'; allowed: 'llama'",
        ),
    ],
)
def test_each_refusal(changed: dict[str, Any], part: str) -> None:
    assert find_refusal(config()) is None
    assert find_refusal(config(scheduler_config__scheduler_cls=SCHEDULER)) is None
    found = find_refusal(config(**changed))
    assert found is not None
    assert part in found


def test_model_runner_v1_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in str(find_refusal(config(use_v2_model_runner=False)))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    assert "TRITON_INTERPRET=1" in str(find_refusal(config(use_v2_model_runner=False)))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert "does not support: a feature" in str(find_refusal(config(use_v2_model_runner=False)))


@pytest.fixture(scope="module")
def engine(small_llava: Path) -> Iterator[Remote]:
    """With a budget of tokens that is too small for the longest prompt, which start-up mends."""
    with remote_engine(
        small_llava, FICOCO, block_size=32, max_model_len=1024, max_num_batched_tokens=300
    ) as engine:
        yield engine


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ficoco", "options", "parts"),
    [
        (FICOCO, {"pipeline_parallel_size": 2}, ["ficoco-l", "--pipeline-parallel-size must be 1"]),
        (FICOCO, {"enable_lora": True}, ["ficoco-l", "--enable-lora"]),
        (
            FICOCO,
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            ["ficoco-l", "--speculative-config"],
        ),
        (FICOCO, {"async_scheduling": False}, ["--no-async-scheduling"]),
        (FICOCO | {"keep": 145}, {}, ["ficoco_keep = 145", "1 to 144"]),
        (FICOCO | {"num_segments": 3}, {}, ["num_segments = 3", "1, 2, 4, 8"]),
        ({"method": "fastv", "kv_budget": 5.0}, {}, ["kv_budget = 5.0"]),
        ({"method": "ficoco-vl", "encoder": {"keep": 145}}, {}, ["keep = 145"]),
    ],
)
def test_refused_at_start_up(
    engine: Remote, small_llava: Path, ficoco: dict[str, Any], options: dict[str, Any], parts: list[str]
) -> None:
    found = engine.call(calls.start_up_error, str(small_llava), ficoco, options)
    assert all(part in found for part in parts), found


@pytest.mark.engine
def test_start_up_makes_room_for_whole_prompts(engine: Remote, images: list[Image.Image]) -> None:
    """Nothing that is accepted may wait forever for a step that is large enough."""
    assert engine.call(calls.settings_of) == {
        "scheduler": SCHEDULER,
        "chunked_prefill": False,
        "prefix_caching": False,
        "max_num_batched_tokens": 1024,
        "max_num_encoder_input_tokens": 1024,
        "encoder_cache_size": 1024,
    }
    longest = Ask(TWO_IMAGES.replace("USER:", "USER:" + "a" * 650), images[:2], num_tokens=1)
    (answer,) = engine.call(calls.ask, [longest])
    assert 950 < answer.num_prompt_tokens < 1024


@pytest.mark.engine
@pytest.mark.parametrize(
    ("prompt", "extra", "more", "mm", "parts"),
    [
        (PROMPT, {"ficoco_keep": 145}, {}, {}, ["ficoco_keep = 145", "1 to 144"]),
        (PROMPT, {"ficoco_method": "tome"}, {}, {}, ["ficoco_method = 'tome'", "fastv"]),
        (PROMPT, {}, {"prompt_logprobs": 1}, {}, ["prompt_logprobs = 1", "ficoco_keep = 144"]),
        ("<s>USER: what is this? <image>", {}, {}, {}, ["ends in an image"]),
        (PROMPT, {}, {}, {"ficoco_keep": 9}, ["ficoco_keep in mm_processor_kwargs", "vllm_xargs"]),
    ],
)
def test_refused_requests(
    engine: Remote,
    images: list[Image.Image],
    prompt: str,
    extra: dict[str, Any],
    more: dict[str, Any],
    mm: dict[str, Any],
    parts: list[str],
) -> None:
    found = engine.call(refusal_with, Ask(prompt, [images[0]], extra=extra, mm=mm), more)
    assert all(part in found for part in parts), found
    (answer,) = engine.call(calls.ask, [Ask(PROMPT, [images[0]], num_tokens=1)])  # and the engine lives on
    assert answer.tokens


def refusal_with(engine: Any, one: Ask, more: dict[str, Any]) -> str:
    """`calls.refusal` with further sampling parameters."""
    return calls.refusal(engine, one, **more)


@pytest.mark.engine
def test_prompt_logprobs_where_nothing_is_reduced(engine: Remote, images: list[Image.Image]) -> None:
    assert engine.call(refusal_with, Ask(TEXT_ONLY), {"prompt_logprobs": 1}) == ""
    kept = Ask(PROMPT, [images[0]], extra={"ficoco_keep": 144})
    assert engine.call(refusal_with, kept, {"prompt_logprobs": 1}) == ""
