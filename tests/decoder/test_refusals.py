"""Refusal of unsupported configurations at start-up and of unsupported requests; nothing is half answered."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPVisionConfig
from vllm.config.compilation import CUDAGraphMode

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder.layers import LAYER_KINDS
from ficoco_vllm.decoder.startup import SCHEDULER, find_refusal, prepare_decoder
from tests.decoder import calls
from tests.decoder.calls import Ask
from tests.support.engine import PROMPT, TEXT_ONLY, TWO_IMAGES
from tests.support.remote import Host, Remote

pytestmark = pytest.mark.compat

FICOCO = {"method": "ficoco-l", "keep": 16, "windows": "off"}


def config(**changed: Any) -> Any:
    """The part of a vLLM configuration that the check reads, all allowed; `changed` maps dotted paths to values."""
    result = SimpleNamespace(
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            data_parallel_size=2,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        scheduler_config=SimpleNamespace(
            disable_hybrid_kv_cache_manager=None,
            scheduler_cls=None,
            async_scheduling=None,
            long_prefill_token_threshold=0,
            max_num_scheduled_tokens=None,
            max_num_batched_tokens=700,
            max_num_seqs=16,
            enable_chunked_prefill=True,
        ),
        cache_config=SimpleNamespace(
            kv_offloading_size=None, kv_cache_dtype_skip_layers=[], cache_dtype="auto", block_size=16
        ),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE),
        model_config=SimpleNamespace(
            max_model_len=512,
            runner_type="generate",
            enable_prompt_embeds=False,
            is_moe=False,
            hf_config=SimpleNamespace(
                model_type="llava",
                vision_config=CLIPVisionConfig(),
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
                get_text_config=lambda: SimpleNamespace(model_type="llama"),
            ),
        ),
        speculative_config=None,
        kv_transfer_config=None,
        kv_events_config=None,
        use_v2_model_runner=True,
        _get_v2_model_runner_unsupported_features=lambda: ["a feature"],
    )
    for path, value in changed.items():
        *parents, name = path.split("__")
        target = result
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, name, value)
    return result


def test_what_is_allowed() -> None:
    assert find_refusal(config()) is None
    assert find_refusal(config(scheduler_config__scheduler_cls=SCHEDULER)) is None
    assert find_refusal(config(scheduler_config__max_num_scheduled_tokens=512)) is None
    drafts = SimpleNamespace(method="ngram", num_speculative_tokens=2)
    assert find_refusal(config(speculative_config=drafts)) is None
    drafts.method = "eagle"
    assert "--speculative-config is allowed with method 'ngram' only" in str(
        find_refusal(config(speculative_config=drafts))
    )


@pytest.mark.parametrize(
    ("changed", "part"),
    [
        ({"cache_config__cache_dtype": "fp8"}, "--kv-cache-dtype fp8 is not allowed with ficoco.windows"),
        ({"kv_events_config": SimpleNamespace(enable_kv_cache_events=True)}, "--kv-events-config"),
        # A window of 500 tokens beside 15 requests that decode.
        (
            {"scheduler_config__max_num_scheduled_tokens": 514},
            "allowed: 515 (in addition to decoding requests)",
        ),
    ],
)
def test_what_windows_exclude(changed: dict[str, Any], part: str) -> None:
    settings = {"method": "ficoco-l", "windows": "turn", "window_tokens": 500}
    windowed = config(model_config__hf_config__ficoco=settings, **changed)
    assert part in str(find_refusal(windowed))
    if "scheduler_config__max_num_scheduled_tokens" not in changed:
        assert find_refusal(config(**changed)) is None


@pytest.mark.parametrize(
    ("field", "value", "part"),
    [
        ("sliding_window", 100, "--disable-sliding-window, which limits --max-model-len to 100"),
        ("dual_chunk_attention_config", {"chunk_size": 9}, "chunks of positions"),
        ("llama_4_scaling", {"beta": 0.1}, "scales queries"),
        ("qk_norm", True, "norms of queries and keys"),
    ],
)
@pytest.mark.parametrize("kind", LAYER_KINDS)
def test_layers_that_are_known_but_for_one_field(kind: str, field: str, value: Any, part: str) -> None:
    """Without the field the layer is allowed; None stands for its absence."""
    for given, refused in ((value, True), (None, False)):
        text_config = SimpleNamespace(model_type=kind, **{field: given})
        result = find_refusal(config(model_config__hf_config__get_text_config=lambda c=text_config: c))
        assert (part in str(result)) == refused
        assert refused or result is None


def test_replicas_of_experts_are_refused() -> None:
    """Several engines are allowed for a dense model, and experts in one engine."""
    assert "--data-parallel-size must be 1" in str(find_refusal(config(model_config__is_moe=True)))
    alone = config(model_config__is_moe=True, parallel_config__data_parallel_size=1)
    assert find_refusal(alone) is None


@pytest.mark.parametrize("mode", list(CUDAGraphMode))
def test_graphs_of_decoding_alone_are_allowed(mode: CUDAGraphMode) -> None:
    """The CPU build drops the option, so it is compared with vLLM's own modes here."""
    result = find_refusal(config(compilation_config__cudagraph_mode=mode))
    assert (result is not None) == (mode is CUDAGraphMode.FULL)
    assert result is None or "cudagraph_mode = 'FULL'" in result


def test_breakable_graphs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_USE_BREAKABLE_CUDAGRAPH", True, raising=False)
    assert "VLLM_USE_BREAKABLE_CUDAGRAPH" in str(find_refusal(config()))


def test_model_runner_v1_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert "VLLM_USE_V2_MODEL_RUNNER=0" in str(find_refusal(config(use_v2_model_runner=False)))
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER")
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", False)
    assert "TRITON_INTERPRET=1" in str(find_refusal(config(use_v2_model_runner=False)))
    monkeypatch.setattr("vllm.triton_utils.HAS_TRITON", True)
    assert "does not support: a feature" in str(find_refusal(config(use_v2_model_runner=False)))


@pytest.fixture(scope="module")
def engine(host: Host, small_llava: Path) -> Remote:
    """An engine whose step limit is smaller than the longest prompt; start-up raises the limit."""
    return host.get(small_llava, FICOCO, block_size=32, max_model_len=1024, max_num_batched_tokens=300)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size must be 1"),
        ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
        ({"enable_dbo": True}, "--enable-dbo"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "--kv-transfer-config",
        ),
        ({"kv_offloading_size": 1.0}, "--kv-offloading-size"),
        ({"runner": "pooling", "convert": "embed"}, "--runner pooling"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "--scheduler-cls vllm.v1"),
        ({"async_scheduling": False}, "--no-async-scheduling"),
        ({"long_prefill_token_threshold": 100}, "--long-prefill-token-threshold 100"),
        ({"max_num_scheduled_tokens": 511}, "--max-num-scheduled-tokens 511 is not allowed"),
        ({"hf_overrides": {"vision_feature_select_strategy": "full"}}, "strategy = 'full'"),
        (
            {"hf_overrides": {"text_config": {"model_type": "gemma2"}}},
            "the decoder is 'gemma2'; allowed: 'llama', 'mistral', 'qwen2', 'qwen3', 'qwen3_moe', 'qwen3_vl_text', "
            "'qwen3_vl_moe_text'",
        ),
        (
            {"hf_overrides": {"text_config": {"model_type": "mistral", "sliding_window": 64}}},
            "the decoder ('mistral') attends to the last 64 tokens only",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused_at_start_up(
    engine: Remote, small_llava: Path, options: dict[str, Any], part: str
) -> None:
    """The check is part of building vLLM's configuration; without our settings the options pass."""
    result = engine.call(calls.start_up_error, str(small_llava), FICOCO, options)
    assert "ficoco.method = 'ficoco-l': " in result
    assert part in result
    assert "ficoco" not in engine.call(calls.start_up_error, str(small_llava), {}, options)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ficoco", "parts"),
    [
        (FICOCO | {"keep": 145}, ["ficoco_keep = 145", "1 to 144"]),
        (FICOCO | {"num_segments": 3}, ["num_segments = 3", "1, 2, 4, 8"]),
        ({"method": "fastv", "kv_budget": 5.0}, ["kv_budget = 5.0"]),
        ({"method": "ficoco-vl", "encoder": {"keep": 145}}, ["keep = 145"]),
        (FICOCO | {"local_penalty": True}, ["local_penalty"]),
    ],
)
def test_settings_that_are_refused_at_start_up(
    engine: Remote, small_llava: Path, ficoco: dict[str, Any], parts: list[str]
) -> None:
    result = engine.call(calls.start_up_error, str(small_llava), ficoco, {})
    assert all(part in result for part in parts), result


@pytest.mark.engine
def test_model_runner_v1_is_refused_at_start_up(engine: Remote, small_llava: Path) -> None:
    result = engine.call(start_up_error_with_runner_v1, str(small_llava))
    assert "VLLM_USE_V2_MODEL_RUNNER=0 is not allowed" in result


def start_up_error_with_runner_v1(engine: Any, model: str) -> str:
    """`calls.start_up_error` where the environment asks for model runner V1."""
    import vllm.envs as envs

    envs.disable_envs_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        result = calls.start_up_error(engine, model, FICOCO, {})
    envs.enable_envs_cache()
    return result


ROOM = {
    "scheduler": SCHEDULER,
    "chunked_prefill": False,
    "prefix_caching": False,
    "max_num_batched_tokens": 1024,
    "max_num_encoder_input_tokens": 1024,
    "encoder_cache_size": 1024,
}


@pytest.mark.engine
def test_start_up_makes_room_for_whole_prompts(
    engine: Remote, small_llava: Path, images: list[Image.Image]
) -> None:
    """Nothing that is accepted may wait forever for a step that is large enough, or for room for its images."""
    assert engine.call(calls.settings_of) == ROOM
    # The tower's part scales the encoder's budget of a step down; a prompt must still find room for all of its images.
    options = {"max_model_len": 1024, "max_num_batched_tokens": 300, "enable_prefix_caching": True}
    both = {"method": "ficoco-vl", "keep": 9, "windows": "off"}
    assert engine.call(calls.settings_of_another, str(small_llava), both, options) == ROOM
    longest = Ask(TWO_IMAGES.replace("USER:", "USER:" + "a" * 650), images[:2], num_tokens=1)
    (answer,) = engine.call(calls.ask, [longest])
    assert 950 < answer.num_prompt_tokens < 1024


@pytest.mark.parametrize(
    ("method", "cache_dtype", "windows"), [("sparsevlm", "auto", "prompt"), ("ficoco-l", "fp8", "off")]
)
def test_window_tokens_of_windows_that_do_not_end_with_a_turn(
    method: str, cache_dtype: str, windows: str
) -> None:
    vllm_config: Any = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=None),
        cache_config=SimpleNamespace(cache_dtype=cache_dtype),
        kv_events_config=None,
    )
    settings = FicocoConfig.parse({"method": method, "window_tokens": 700})
    with pytest.raises(
        ValueError, match=rf"ficoco\.window_tokens = 700 .* '{windows}', .* allowed: .*'turn'"
    ):
        prepare_decoder(vllm_config, settings)


@pytest.mark.engine
@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("ficoco-l", {}, "turn"),
        ("ficoco-vl", {}, "turn"),
        ("vscan-l", {}, "turn"),
        ("sparsevlm", {}, "prompt"),
        ("tops-l", {}, "prompt"),
        ("tops", {}, "turn"),
        ("ficoco-l", {"kv_cache_dtype": "fp8"}, "off"),
    ],
)
def test_windows_where_the_settings_name_none(
    engine: Remote, small_llava: Path, method: str, options: dict[str, Any], expected: str
) -> None:
    assert engine.call(default_windows_of, str(small_llava), {"method": method}, options) == expected


def default_windows_of(engine: Any, model: str, ficoco: dict[str, Any], options: dict[str, Any]) -> Any:
    """The windows of another engine."""
    return calls.configure(model, ficoco, options).model_config.hf_config.ficoco["windows"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("ficoco", "options", "expected"),
    [
        # A step keeps its size where it holds a window beside 15 requests that decode.
        ({"windows": "turn"}, {"max_num_batched_tokens": 600}, (True, 600, 585, 32)),
        ({"windows": "turn"}, {"max_num_batched_tokens": 64}, (True, 144 + 256 + 15, 400, 32)),
        ({"windows": "turn", "window_tokens": 300}, {"max_num_batched_tokens": 64}, (True, 315, 300, 32)),
        ({"windows": "turn"}, {"enable_prefix_caching": False}, (False, 2048, 1024, 1)),
        ({"windows": "prompt"}, {"max_num_batched_tokens": 64}, (True, 1024, None, 1)),
    ],
)
def test_start_up_makes_room_for_windows(
    engine: Remote,
    small_llava: Path,
    ficoco: dict[str, Any],
    options: dict[str, Any],
    expected: tuple[Any, ...],
) -> None:
    """Prefix caching, tokens of a step and of a window, and the multiple in which visual tokens leave."""
    more = {"max_model_len": 1024, "max_num_seqs": 16, "max_num_batched_tokens": 2048, **options}
    assert engine.call(windows_of, str(small_llava), FICOCO | ficoco, more) == expected


def windows_of(engine: Any, model: str, ficoco: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """What start-up makes of the settings of another engine."""
    made = calls.configure(model, ficoco, options)
    ours = made.model_config.hf_config.ficoco
    scheduler = made.scheduler_config
    assert scheduler.enable_chunked_prefill
    assert scheduler.encoder_cache_size >= (ours["window_tokens"] or 1024)
    caching = made.cache_config.enable_prefix_caching
    return caching, scheduler.max_num_batched_tokens, ours["window_tokens"], ours["rounding"]


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
    result = engine.call(refusal_with, Ask(prompt, [images[0]], extra=extra, mm=mm), more)
    assert all(part in result for part in parts), result
    (answer,) = engine.call(calls.ask, [Ask(PROMPT, [images[0]], num_tokens=1)])  # and the engine lives on
    assert answer.tokens


def refusal_with(engine: Any, one: Ask, more: dict[str, Any]) -> str:
    """`calls.refusal` with further sampling parameters."""
    return calls.refusal(engine, one, **more)


@pytest.mark.engine
def test_a_search_by_beams_is_refused(engine: Remote, images: list[Image.Image]) -> None:
    """Offline; `test_server.py` tests it over HTTP."""
    assert "use_beam_search = True" in engine.call(search, Ask(PROMPT, [images[0]]))


def search(engine: Any, one: Ask) -> str:
    """Error for a beam search; empty if it is answered."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import BeamSearchParams

    try:
        engine.beam_search([one.body()], BeamSearchParams(beam_width=2, max_tokens=2))
    except VLLMValidationError as error:
        return str(error)
    return ""


@pytest.mark.engine
def test_prompt_logprobs_where_nothing_is_reduced(engine: Remote, images: list[Image.Image]) -> None:
    assert engine.call(refusal_with, Ask(TEXT_ONLY), {"prompt_logprobs": 1}) == ""
    kept = Ask(PROMPT, [images[0]], extra={"ficoco_keep": 144})
    assert engine.call(refusal_with, kept, {"prompt_logprobs": 1}) == ""
