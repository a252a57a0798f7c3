"""`plan` for LLaVA-NeXT equals the served plan."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.savings import SavingsPlanner
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import KNOWN_MODELS, model_shape
from ficoco_vllm.server.commands import plan

NEXT_7B = "llava-hf/llava-v1.6-vicuna-7b-hf"
CONFIG = KNOWN_MODELS[NEXT_7B]
HF_CONFIG = LlavaNextConfig(
    vision_config=CLIPVisionConfig(**CONFIG["vision_config"]),
    text_config=LlamaConfig(**CONFIG["text_config"]),
    image_grid_pinpoints=CONFIG["image_grid_pinpoints"],
)


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    assert plan.run(parser.parse_args(["plan", NEXT_7B, *options, "--json"])) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


def server_plan(method: str, keep: int = 64) -> ServerPlan:
    return ServerPlan.of(FicocoConfig(method=method, keep=keep), HF_CONFIG)


@pytest.mark.parametrize("size", [(672, 672), (300, 2000), (2000, 300), (10, 10), (500, 700)])
@pytest.mark.parametrize(
    "method", ["ficoco-v", "tome", "evit", "topk-cls", "visionzip", "ficoco-l", "ficoco-vl"]
)
def test_what_is_planned_is_what_is_served(
    capsys: pytest.CaptureFixture[str], size: tuple[int, int], method: str
) -> None:
    """Tiles, placeholders and segments of a server that reads transformers' configuration."""
    height, width = size
    served = server_plan(method)
    layout = served.tower.layout(served.tower.default, height, width)
    counts: tuple[int, ...] = (layout.num_tokens,)
    if served.decoder is not None:
        request = served.decoder.plan(layout.num_tokens + 60, [(1, layout.num_tokens)], None)
        counts = tuple(segment[0] for segment in request.counts)
    planned = report(capsys, "--method", method, "--keep", "64", "--image-size", f"{width}x{height}")
    kept = [tile.keep for tile in layout.tiles]
    assert [tile["kept"] for tile in planned["tiles"]] == kept
    assert planned["image_tokens"] == layout.num_before
    size_of_segment = 32 // len(counts)
    layers = [counts[layer // size_of_segment] for layer in range(32)]
    assert planned["decoder_visual_tokens"] == [*layers, counts[-1]]


def test_a_tile_with_padding() -> None:
    """Layer 11 is the first that reduces: until then the tower sees all 576 patches, from there on 240 at most."""
    _, tile, *_ = server_plan("ficoco-v").image_tokens(size=(300, 2000)).tiles
    assert tile.layers[:11] == ((576, 576),) * 11
    assert tile.layers[11] == (240, 225)
    assert tile.layers[-1][1] == tile.kept == 64


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """672 x 672: 5 x 576 patches and 48 newlines; with 64 a tile 5 x 64 and 2. A token is 0.524288 MB of KV cache."""
    result = report(capsys, "--keep", "64", "--text-tokens", "60", "--images", "2")
    assert (result["image_tokens"], result["decoder_visual_tokens"][0]) == (2928, 322)
    assert result["unreduced"]["kv_bytes"] == (2 * 2928 + 60) * 524288
    assert result["reduced"]["kv_bytes"] == (2 * 322 + 60) * 524288
    assert result["tiles"] == [{"patches": 576, "kept": 64}] * 5
    wide = report(capsys, "--keep", "300", "--image-size", "2000x300")
    assert [tile["kept"] for tile in wide["tiles"]] == [300, 240, 240, 240]
    whole = report(capsys, "--keep", "576", "--image-size", "2000x300")
    assert whole["reduced"] == whole["unreduced"]
    deep = report(capsys, "--method", "ficoco-l", "--keep", "1000")
    assert deep["decoder_visual_tokens"][-1] == 1000


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (NEXT_7B, ["--image-size", "3"], "image_size: got '3', allowed: WIDTHxHEIGHT"),
        (NEXT_7B, ["--image-size", "0x3"], "image_size: got '0x3'"),
        (NEXT_7B, ["--keep", "577"], "577"),
        (NEXT_7B, ["--images", "0"], "num_images: got 0"),
        (NEXT_7B, ["--schedule", "11:64"], "schedule: got LAYER:KEEP, allowed with this model"),
        (
            "llava-hf/llava-1.5-7b-hf",
            ["--image-size", "3x3"],
            "allowed where it decides the number of tokens",
        ),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    keep = [] if "--keep" in options or "--schedule" in options else ["--keep", "64"]
    assert plan.run(parser.parse_args(["plan", model, *keep, *options])) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("pinpoints", [None, [], [[336]], [[335, 336]], [["a", "b"]]])
def test_wrong_pinpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str], pinpoints: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "image_grid_pinpoints": pinpoints}))
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    assert plan.run(parser.parse_args(["plan", str(tmp_path), "--keep", "64"])) == 2
    assert "image_grid_pinpoints: got" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ficoco-v", "topk-cls", "ficoco-l", "ficoco-vl"])
def test_accounts_are_those_of_the_planner(capsys: pytest.CaptureFixture[str], method: str) -> None:
    """An image of 2000 x 300, reduced by the defaults: the savings equal those reported for a request."""
    size, num_text = (300, 2000), 60
    plan = server_plan(method, 100)
    entering = plan.tower.num_image_tokens(plan.tower.default, height=300, width=2000)
    savings_planner = SavingsPlanner(plan, model_shape(CONFIG))
    savings = savings_planner.compute(num_text + entering, [(1, entering)], plan.tower.default, None, [size])
    planned = report(capsys, "--method", method, "--keep", "100", "--image-size", "2000x300")
    assert savings.visual_tokens_in == planned["image_tokens"] == 1306
    assert savings.visual_tokens_kept == planned["decoder_visual_tokens"][-1]
    saved = planned["unreduced"]["total_flops"] - planned["reduced"]["total_flops"]
    assert savings.flops_avoided == saved
