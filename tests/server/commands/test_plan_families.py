"""`plan` for InternVL and Qwen3-VL equals the served plan; their configurations are known without a download."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import InternVLConfig, Qwen3VLConfig, Qwen3VLMoeConfig

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.savings import SavingsPlanner
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower_shape import IMAGES
from ficoco_vllm.reduction.cost import KNOWN_MODELS, model_shape
from ficoco_vllm.server.commands import plan

INTERNVL, QWEN = "OpenGVLab/InternVL3-8B-hf", "Qwen/Qwen3-VL-8B-Instruct"
EXPERTS = "Qwen/Qwen3-VL-30B-A3B-Instruct"
FAMILIES = {"internvl": InternVLConfig, "qwen3_vl": Qwen3VLConfig, "qwen3_vl_moe": Qwen3VLMoeConfig}
METHODS = ("ficoco-v", "tome", "divprune", "ficoco-l", "ficoco-vl")
# Settings of the image processors, as the families read them.
SETTINGS = {
    INTERNVL: {"crop_to_patches": True, "min_patches": 1, "max_patches": 12},
    QWEN: {"min_pixels": 65536, "max_pixels": 16777216, "do_resize": True},
    EXPERTS: {"min_pixels": 65536, "max_pixels": 16777216, "do_resize": True},
}


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    status = plan.run(parser.parse_args(["plan", *options]))
    return (status, *capsys.readouterr())


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    status, out, err = run(capsys, *options, "--json")
    assert (status, err) == (0, "")
    parsed: dict[str, Any] = json.loads(out)
    return parsed


def hf_config(model: str) -> Any:
    """Transformers' configuration with the image processor's settings, as `models/verify.py` leaves them there."""
    config = KNOWN_MODELS[model]
    result = FAMILIES[config["model_type"]](**config)
    if model in SETTINGS:
        setattr(result, IMAGES, SETTINGS[model])
    return result


@pytest.mark.parametrize("size", [(448, 448), (720, 1280), (2000, 300), (30, 40)])
@pytest.mark.parametrize(
    ("model", "method"),
    [
        *((model, method) for model in (INTERNVL, QWEN) for method in METHODS),
        (EXPERTS, "ficoco-vl"),
        (QWEN, "downscale"),
    ],
)
def test_what_is_planned_is_what_is_served(
    capsys: pytest.CaptureFixture[str], model: str, method: str, size: tuple[int, int]
) -> None:
    (height, width), config = size, hf_config(model)
    served = ServerPlan.of(FicocoConfig(method=method, keep=28), config)
    tokens, stock = served.image_tokens(size=size), served.unreduced(size)
    planned = report(capsys, model, "--method", method, "--keep", "28", "--image-size", f"{width}x{height}")
    assert planned["decoder_visual_tokens"] == list(tokens.decoder)
    assert planned["image_tokens"] == stock.decoder[0]
    assert planned["encoder_tokens"] == list(tokens.encoder)
    budget = served.tower.default
    entering = served.tower.num_image_tokens(budget, height=height, width=width)
    assert entering == tokens.decoder[0]
    savings = SavingsPlanner(served, model_shape(config.to_dict())).compute(
        60 + entering, [(1, entering)], budget, None, [size]
    )
    saved = planned["unreduced"]["total_flops"] - planned["reduced"]["total_flops"]
    assert savings.flops_avoided == (saved if tokens != stock else 0)


@pytest.mark.parametrize("model", [name for name in KNOWN_MODELS if "llava" not in name])
def test_known_configurations_are_transformers_own(model: str) -> None:
    """Nothing that a plan needs is left to a default that transformers chooses differently."""
    assert model_shape(hf_config(model).to_dict()) == model_shape(KNOWN_MODELS[model])


def test_figures_of_internvl(capsys: pytest.CaptureFixture[str]) -> None:
    """A wide image: 4 tiles and a thumbnail of 1024 patches and [CLS]; each four patches become one token."""
    result = report(capsys, INTERNVL, "--keep", "64", "--image-size", "1792x448", "--text-tokens", "40")
    assert result["tiles"] == [{"patches": 256, "kept": 64}] * 5
    assert (result["image_tokens"], result["decoder_visual_tokens"][0]) == (1280, 320)
    # Four heads of keys and four of values, of width 128, in 28 layers.
    assert result["unreduced"]["kv_bytes"] == (1280 + 40) * 28 * 2 * 4 * 128 * 2
    tokens, width, mlp = 1025, 1024, 4096
    layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * mlp
    assert result["unreduced"]["tower_flops"] == 5 * (24 * layer + 2 * 1024 * 3 * 14**2 * width)
    assert result["unreduced"]["projector_flops"] == 2 * 1280 * (4 * 1024 * 3584 + 3584**2)


def chat_config(model: str) -> dict[str, Any]:
    """config.json of a known InternVL in OpenGVLab's own format."""
    config = KNOWN_MODELS[model]
    vision = dict(config["vision_config"])
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "norm_type")
    return {
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 448,
        "llm_config": {**config["text_config"], "tie_word_embeddings": False},
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "use_thumbnail": True,
        "vision_config": {
            **{name: vision[name] for name in same},
            "model_type": "intern_vit_6b",
            "image_size": 448,
            "patch_size": 14,
            "qk_normalization": vision["use_qk_norm"],
            "qkv_bias": vision["attention_bias"],
        },
    }


@pytest.mark.parametrize("model", [name for name in KNOWN_MODELS if "InternVL" in name])
@pytest.mark.parametrize("method", ["ficoco-v", "divprune", "ficoco-vl"])
def test_both_formats_of_internvl_have_the_same_plan(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: str, method: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(chat_config(model)))
    # Files of this format bring settings of a CLIP, which nothing reads.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 448, "max_patches": 3}))
    options = ("--method", method, "--keep", "28", "--image-size", "1280x720")
    planned, expected = (report(capsys, name, *options) for name in (str(tmp_path), model))
    assert {**planned, "model": model} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, "ps_version = 'v1' cannot be reduced; allowed: 'v2'"),
        ({"select_layer": -4}, "select_layer = -4 cannot be reduced; allowed: -1"),
        ({"max_dynamic_patch": "many"}, "max_dynamic_patch = 'many' is not allowed"),
        (
            {"llm_config": {"model_type": "internlm2"}},
            "text_config.model_type: got 'internlm2', allowed: qwen2",
        ),
        ({"vision_config": None}, "vision_config: got None"),
    ],
)
def test_opengvlabs_formats_that_cannot_be_planned(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**chat_config(INTERNVL), **changes}))
    status, _, err = run(capsys, str(tmp_path), "--keep", "28")
    assert (status, message in err) == (2, True), err


def test_figures_of_qwen3_vl(capsys: pytest.CaptureFixture[str]) -> None:
    """1280 x 720 pixels: 44 x 80 patches in 22 x 40 units; the projector also runs after three layers of the tower."""
    result = report(capsys, QWEN, "--keep", "98", "--image-size", "1280x720", "--method", "divprune")
    assert (result["image_tokens"], result["patches_per_token"]) == (880, 4)
    assert result["decoder_visual_tokens"] == [98] * 37
    patches, width = 3520, 1152
    layer = 8 * patches * width**2 + 4 * patches**2 * width + 4 * patches * width * 4304
    assert result["reduced"]["tower_flops"] == 27 * layer + 2 * patches * 2 * 3 * 16**2 * width
    merger = 2 * 4608 * (4608 + 4096)
    assert result["unreduced"]["projector_flops"] == 4 * 880 * merger
    assert result["reduced"]["projector_flops"] == (3 * 880 + 98) * merger
    ratio = report(capsys, QWEN, "--keep-ratio", "0.25", "--image-size", "1280x720")
    assert ratio["decoder_visual_tokens"][0] == 220


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, QWEN, "--keep", "98", "--image-size", "1280x720")
    assert "An image of 1280 x 720 pixels keeps 98 of 880 visual tokens" in out
    assert "Units of 4 patches of an image that enter each layer of the vision tower" in out
    _, out, _ = run(capsys, INTERNVL, "--keep", "64", "--image-size", "896x448")
    assert "has 3 tiles, each of which keeps 64 of 256 visual tokens" in out


def test_tiles_with_padding(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "llava-hf/llava-v1.6-vicuna-7b-hf", "--keep", "300", "--image-size", "2000x300")
    assert "has 4 tiles, which keep 300 of 576, 240 of 240, 240 of 240, 240 of 240 visual tokens" in out


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_settings_of_the_image_processor(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[INTERNVL]))
    settings: dict[str, Any] = {"max_patches": 4}
    (tmp_path / name).write_text(
        json.dumps(settings if name.startswith("pre") else {"image_processor": settings})
    )
    for model in (tmp_path, tmp_path / "config.json"):
        assert report(capsys, str(model), "--keep", "64")["image_tokens"] == 5 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([QWEN, "--keep", "98", "--keep-ratio", "0.5"], "keep_ratio = 0.5 together with keep = 98"),
        ([QWEN, "--keep-ratio", "0"], "ficoco_keep_ratio = 0.0 is not allowed"),
        (
            [QWEN, "--method", "downscale", "--schedule", "even"],
            "schedule: got 'even', allowed with downscale: keep",
        ),
        (
            [QWEN, "--method", "ficoco-v", "--schedule", "13:98"],
            "schedule: got LAYER:KEEP, allowed with this model",
        ),
        ([INTERNVL, "--method", "downscale", "--keep", "64"], "'downscale' is not allowed, since it needs"),
        ([INTERNVL, "--keep", "257"], "257"),
        (["Qwen/Qwen4-VL"], "or one of llava-hf/llava-1.5-7b-hf"),
    ],
)
def test_wrong_input(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    status, _, err = run(capsys, *options)
    assert status == 2
    assert message in err


def test_a_broken_file_of_settings(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[QWEN]))
    (tmp_path / "preprocessor_config.json").write_text("[]")
    status, _, err = run(capsys, str(tmp_path))
    assert (status, "preprocessor_config.json holds a list" in err) == (2, True)
    for wrong in ('{"size": 3}', '{"size": {"longest_edge": "large"}}', '{"size": {"shortest_edge": -1}}'):
        (tmp_path / "preprocessor_config.json").write_text(wrong)
        status, _, err = run(capsys, str(tmp_path))
        assert (status, "preprocessor_config.json: got {'do_resize'" in err) == (2, True)


@pytest.mark.parametrize("model_type", ["internvl", "qwen3_vl"])
def test_fields_left_out_are_transformers_defaults(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_type: str
) -> None:
    text = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": model_type, "vision_config": {}, "text_config": text})
    )
    planned = report(capsys, str(tmp_path), "--keep", "28", "--method", "ficoco-vl")
    assert len(planned["encoder_tokens"]) == {"internvl": 24, "qwen3_vl": 27}[model_type] + 1
    assert len(planned["decoder_visual_tokens"]) == 32 + 1
