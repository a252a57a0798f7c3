"""Plain vLLM with `additional_config`: checked at start-up, before any weight is loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.tracing.worker import QUALIFIED_NAME as TRACING_WORKER

pytestmark = [pytest.mark.compat, pytest.mark.engine]


def configure(model: Path, ficoco: dict[str, Any] | None, **options: Any) -> Any:
    """Configuration that the engine would start with."""
    additional = {} if ficoco is None else {NAME: ficoco}
    return EngineArgs(
        str(model), additional_config=additional, max_model_len=2048, **options
    ).create_engine_config()


def test_settings_travel_with_the_model_configuration(random_llava: Path) -> None:
    config = configure(random_llava, {"keep": 64, "lam": 0.5})
    result = FicocoConfig.of(config.model_config.hf_config)
    assert (result.method, result.keep, result.settings) == ("ficoco-v", 64, {"lam": 0.5})


def test_settings_are_part_of_the_compile_hash(random_llava: Path) -> None:
    hashes = {configure(random_llava, {"keep": keep}).compute_hash() for keep in (64, 65)}
    assert len(hashes) == 2


def test_workers_return_traces_only_if_enabled(random_llava: Path) -> None:
    with_traces = configure(random_llava, {"keep": 64, "explain": True})
    without = configure(random_llava, {"keep": 64})
    assert with_traces.parallel_config.worker_extension_cls == TRACING_WORKER
    assert without.parallel_config.worker_extension_cls == ""


def test_nothing_happens_without_settings(random_llava: Path) -> None:
    config = configure(random_llava, None, max_num_batched_tokens=4096)
    assert not hasattr(config.model_config.hf_config, NAME)
    assert config.scheduler_config.max_num_encoder_input_tokens == 4096


@pytest.mark.parametrize(
    ("ficoco", "options", "parts"),
    [
        ({"method": "magic"}, {}, ["method = 'magic'", "ficoco-v"]),
        ({"keep": 577}, {}, ["ficoco.keep = 577", "1 to 576"]),
        ({"keep": 64, "epsilon": 2}, {}, ["epsilon = 2"]),
        ({"keep": 64, "filter": "text_relevance"}, {}, ["ficoco-v", "text_relevance"]),
        ({"keep": 64, "text_encoder": "missing"}, {}, ["ficoco.text_encoder = 'missing' cannot be read"]),
        ({"keep": 64, "backend": "triton"}, {}, ["ficoco.backend = 'triton'", "'auto', 'torch'"]),
        ({"keep": 64, "backend": "cuda"}, {}, ["ficoco.backend = 'cuda'", "'auto', 'torch' or 'triton'"]),
        (
            {"keep": 64, "explain": True},
            {"worker_extension_cls": "other.Extension"},
            ["worker_extension_cls = 'other.Extension'", "ficoco.explain"],
        ),
        (
            {"keep": 64},
            {"enable_lora": True, "enable_tower_connector_lora": True},
            ["enable_tower_connector_lora = True"],
        ),
    ],
)
def test_refused(
    random_llava: Path, ficoco: dict[str, Any], options: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what is tested)
        configure(random_llava, ficoco, **options)
    for part in parts:
        assert part in str(caught.value)


def test_graphs_of_the_tower_where_they_know_the_reduction(random_llava: Path, random_next: Path) -> None:
    graphs = {"compilation_config": {"cudagraph_mm_encoder": True}}
    configure(random_llava, {"keep": 64}, **graphs)
    with pytest.raises(ValueError, match="cudagraph_mm_encoder = True is not allowed"):
        configure(random_next, {"keep": 64}, **graphs)


@pytest.mark.parametrize(
    ("section", "field", "value", "part"),
    [
        (
            "vision_config",
            "model_type",
            "siglip_vision_model",
            "vision_config.model_type = 'siglip_vision_model'",
        ),
        (None, "vision_feature_layer", [-2, -3], "vision_feature_layer = [-2, -3]"),
    ],
)
def test_other_towers_are_refused(
    random_llava: Path, tmp_path: Path, section: str | None, field: str, value: Any, part: str
) -> None:
    folder = shutil.copytree(random_llava, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (config[section] if section else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is what is tested)
        configure(folder, {"keep": 64})
    assert part in str(caught.value)


def test_other_models_are_refused(random_llava: Path, tmp_path: Path) -> None:
    """A language model alone, which vLLM would serve without a reduction."""
    config = json.loads((random_llava / "config.json").read_text())["text_config"]
    folder = shutil.copytree(random_llava, tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="'LlamaForCausalLM' cannot be reduced; allowed: LlavaForConditional"
    ):
        configure(folder, {"keep": 64})
    configure(folder, None)
