"""`plan` for LLaVA-NeXT: what is planned is what is served."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.savings import Accountant
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.tiles import layout, served_tiles
from ficoco_vllm.planning.tiling import Tiling
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.cost import KNOWN_MODELS, Budget, TilePlan, model_shape, plan_tiles
from ficoco_vllm.server.commands import plan

NEXT_7B = "llava-hf/llava-v1.6-vicuna-7b-hf"
CONFIG = KNOWN_MODELS[NEXT_7B]
TILING = Tiling(tuple(map(tuple, CONFIG["image_grid_pinpoints"])), 336, 24)
TOWER = TowerShape(grid=(24, 24), num_layers=24, num_executed_layers=23, with_cls=False, tiling=TILING)


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    assert plan.run(parser.parse_args(["plan", NEXT_7B, *options, "--json"])) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return parsed


@pytest.mark.parametrize("size", [(672, 672), (300, 2000), (2000, 300), (10, 10), (500, 700)])
@pytest.mark.parametrize(
    "method", ["ficoco-v", "tome", "evit", "topk-cls", "visionzip", "ficoco-l", "ficoco-vl"]
)
def test_plan_and_server_agree(size: tuple[int, int], method: str) -> None:
    height, width = size
    config = FicocoConfig(method=method, keep=64)
    tower = VisionPlanner.shared(config, TOWER)
    found = layout(tower, height, width, tower.default)
    entering, last = found.num_tokens, (found.num_tokens,) * 33
    if config.decoder_method is not None:
        most = tower.num_output_tokens(tower.default)
        decoder = DecoderPlanner.shared(config, 32, most, tower.decoder_most)
        counts = decoder.counts(decoder.method, entering, 64)
        assert counts[-1] == 64
        last = (*(counts[layer // 4] for layer in range(32)), 64)
    served = served_tiles(tower, tower.default, [size], last)
    places = [place for place in TILING.places(height, width) if place.crop.num_patches]
    sizes = [place.crop.num_patches for place in places]
    newlines = (found.num_before - sum(sizes), len({place.row for place in places} - {-1}))
    planned = plan_tiles(model_shape(CONFIG), method, Budget(keep=64), None, sizes, newlines)
    assert planned.tiles == served.tiles
    assert planned.projected == served.projected
    assert (planned.decoder[0], planned.decoder[-1]) == (entering, last[-1])
    if config.decoder_method is None:
        assert planned.decoder == served.decoder


def test_a_tile_with_padding() -> None:
    """Layer 11 is the first that reduces: until then the tower sees all 576 patches, from there on 240 at most."""
    tower = VisionPlanner.shared(FicocoConfig(keep=64), TOWER)
    _, tile, *_ = served_tiles(tower, tower.default, [(300, 2000)], (257,) * 33).tiles
    assert tile.layers[:11] == ((576, 576),) * 11
    assert tile.layers[11] == (240, 225)
    assert tile.layers[-1][1] == tile.kept == 64
    assert TilePlan.of(576, (240,) * 24, 240).layers == ((576, 576),) * 23


def test_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """672 x 672: 5 x 576 patches and 48 newlines; with 64 a tile 5 x 64 and 2. A token is 0.524288 MB of KV cache."""
    found = report(capsys, "--keep", "64", "--text-tokens", "60", "--images", "2")
    assert (found["image_tokens"], found["decoder_visual_tokens"][0]) == (2928, 322)
    assert found["unreduced"]["kv_bytes"] == (2 * 2928 + 60) * 524288
    assert found["reduced"]["kv_bytes"] == (2 * 322 + 60) * 524288
    assert found["tiles"] == [{"patches": 576, "kept": 64}] * 5
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
        ("llava-hf/llava-1.5-7b-hf", ["--image-size", "3x3"], "allowed with a LLaVA-NeXT only"),
    ],
)
def test_wrong_input(
    capsys: pytest.CaptureFixture[str], model: str, options: list[str], message: str
) -> None:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    keep = [] if "--keep" in options else ["--keep", "64"]
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
    """An image of 2000 x 300, reduced in the default places: FLOPs and tokens that a request is told to have saved."""
    size, num_text = (300, 2000), 60
    config = FicocoConfig(method=method, keep=100)
    hf_config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CONFIG["vision_config"]),
        text_config=LlamaConfig(**CONFIG["text_config"]),
        image_grid_pinpoints=CONFIG["image_grid_pinpoints"],
    )
    tower = VisionPlanner.shared(config, TowerShape.from_hf_config(hf_config))
    decoder = None
    if config.decoder_method is not None:
        most = tower.num_output_tokens(tower.default)
        # As many segments as the planner has layers that reduce.
        decoder = DecoderPlanner.shared(
            config.model_copy(update={"num_segments": 32}), 32, most, tower.decoder_most
        )
    entering = tower.num_image_tokens(tower.default, height=300, width=2000)
    accountant = Accountant(config, hf_config, tower, decoder)
    account = accountant.account(num_text + entering, [(1, entering)], tower.default, None, [size])
    planned = report(capsys, "--method", method, "--keep", "100", "--image-size", "2000x300")
    assert account.visual_tokens_in == planned["image_tokens"] == 1306
    assert account.visual_tokens_kept == planned["decoder_visual_tokens"][-1]
    saved = planned["unreduced"]["total_flops"] - planned["reduced"]["total_flops"]
    # The planner lets tokens leave in the last layer too, where the served decoder would save nothing.
    assert account.flops_avoided == pytest.approx(saved, rel=1e-6 if decoder is None else 0.04)
