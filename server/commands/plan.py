"""`ficoco-vllm plan`: the cost of a method and a budget on a served model, from its configuration alone."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.configurations import hf_config_of
from ficoco_vllm.planning.families import tower_shape
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.cost import (
    DEVICES,
    KNOWN_MODELS,
    Device,
    Estimate,
    ModelShape,
    TokenPlan,
    estimate,
    model_shape,
    predict,
    reached,
    speedup,
)
from ficoco_vllm.server.commands.arguments import fail
from ficoco_vllm.server.commands.methods import obstacle
from ficoco_vllm.server.commands.plan_options import CPU, DEMO, add_parser, parse_size, settings
from ficoco_vllm.server.commands.preflight import check_settings

__all__ = ["DEMO", "add_parser", "as_text", "make_report", "read_config", "run"]

# Incremented when a field of the JSON output is renamed, removed or changes its meaning.
JSON_SCHEMA = 1
_ROWS = (
    ("vision tower, TFLOPs", "tower_flops", 1e12),
    ("projector, TFLOPs", "projector_flops", 1e12),
    ("LLM prefill, TFLOPs", "decoder_flops", 1e12),
    ("all, TFLOPs", "total_flops", 1e12),
    ("reduction itself, MFLOPs", "reduction_flops", 1e6),
    ("KV cache, MB", "kv_bytes", 1e6),
    ("weights, GB", "weight_bytes", 1e9),
    ("activations, GB", "activation_bytes", 1e9),
    ("total memory, GB", "memory_bytes", 1e9),
)
_TIMES = (
    ("vision tower, ms", "tower_seconds", 1e-3),
    ("prefill, ms", "prefill_seconds", 1e-3),
    ("first token alone, ms", "ttft_seconds", 1e-3),
    ("next token alone, ms", "decode_seconds", 1e-3),
    ("concurrent requests", "num_concurrent", 1),
    ("requests a second", "requests_per_second", 1),
)


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Args:
        args: parsed by the parser of `add_parser`.

    Returns:
        Exit code: 0, or 2 if the input is wrong (the reason goes to stderr).
    """
    try:
        report = make_report(args)
        text = json.dumps(report, indent=2) if args.json else as_text(report)
    except OverflowError:
        return fail("a number is too large to plan with")
    except (ValueError, OSError) as error:
        return fail(str(error))
    print(text)
    return 0


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Compute everything that the command prints.

    Args:
        args: parsed by the parser of `add_parser`.

    Returns:
        The JSON output as a dictionary.

    Raises:
        ValueError: an option or a field of the configuration is wrong.
        OSError: the configuration cannot be read.
    """
    config = read_config(args.model)
    check_settings({"method": args.method, "keep": args.keep}, config)
    shape = model_shape(config)
    if config["model_type"] == "llava_next":
        _check_pinpoints(config)
    hf_config = hf_config_of(config, read_images(args.model))
    tower = tower_shape(hf_config)
    tiling = tower.tiling
    if args.image_size is not None and tiling is None:
        raise ValueError(
            f"image_size: got {args.image_size!r}, allowed where it decides the number of tokens"
        )
    plan = _server_plan(settings(args, tower, shape.decoder), tower, hf_config)
    size = None if tiling is None else parse_size(args.image_size) or tiling.largest
    tokens, stock = plan.image_tokens(size=size), plan.unreduced(size)
    prompt = {"num_text_tokens": args.text_tokens, "num_images": args.images, "dtype": args.dtype}
    cost, before = (estimate(shape, images, **prompt) for images in (tokens, stock))
    device = None if args.device is None else _device(args.device)
    return {
        "schema": JSON_SCHEMA,
        "model": args.model,
        "method": args.method,
        **prompt,
        "num_patches": shape.tower.num_patches,
        "patches_per_token": shape.tower.unit,
        "encoder_tokens": list(tokens.encoder),
        "decoder_visual_tokens": list(tokens.decoder),
        "mean_visual_tokens": tokens.mean_visual_tokens,
        **({} if size is None else _tile_report(size, tokens, stock)),
        "reduced": _costs(cost),
        "unreduced": _costs(before),
        "prefill_speedup": asdict(speedup(cost, before)),
        **(
            {} if device is None else _device_report(shape, tokens, stock, device, prompt, args.output_tokens)
        ),
    }


def as_text(report: Mapping[str, Any]) -> str:
    """The report as a table for people.

    Args:
        report: from `make_report`.

    Returns:
        Lines, without a newline at the end.
    """
    encoder, decoder = report["encoder_tokens"], report["decoder_visual_tokens"]
    tiled, unit = "tiles" in report, report["patches_per_token"]
    num_tokens = report["image_tokens"] if tiled else report["num_patches"]
    seen = "the first tile" if tiled and len(report["tiles"]) > 1 else "an image"
    counted = "Patch tokens" if unit == 1 else f"Units of {unit} patches"
    lines = [
        f"{report['model']}: {report['method']}, {report['dtype']}, {report['num_text_tokens']} text tokens, "
        f"{report['num_images']} x {num_tokens} visual tokens",
        *(_tiles(report) if tiled else ()),
        "",
        f"{counted} of {seen} that enter each layer of the vision tower ([CLS] not counted)",
        *_runs(encoder),
        "Visual tokens of an image that enter each layer of the decoder",
        *_runs(decoder),
        f"  {'on average':<14}{report['mean_visual_tokens']:>8.1f}",
        "",
        f"{'':<26}{'no reduction':>14}{report['method']:>16}",
    ]
    for label, field, unit in _ROWS:
        before, after = (report[side][field] / unit for side in ("unreduced", "reduced"))
        lines.append(f"{label:<26}{before:>14.3f}{after:>16.3f}")
    gain = report["prefill_speedup"]
    reason = None if report["method"] in CONTROLS else obstacle(report["method"])
    lines += [
        *(_device_lines(report) if "device" in report else ()),
        "",
        f"Expected speed-up of prefill: {gain['memory_bound']:.2f}x where memory bandwidth is the limit,",
        f"{gain['compute_bound']:.2f}x where arithmetic is (long prompts, large batches).",
        "A multiply-add is 2 FLOPs; MB and GB are decimal. The reduction itself is counted as FiCoCo's (Eqs. 18, 19).",
        *([f"No server can run this: {reason}."] if reason else []),
    ]
    return "\n".join(lines)


def read_config(model: str) -> Mapping[str, Any]:
    """Content of the config.json that `model` names.

    Args:
        model: a known name, "demo", a folder or a file.

    Returns:
        The parsed configuration.

    Raises:
        ValueError: there is no such model, or its file is not a JSON object.
        OSError: the file cannot be read.
    """
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model]
    path = _demo_folder() if model == DEMO else Path(model)
    if path.is_dir():
        path /= "config.json"
    if not path.is_file():
        allowed = f"a folder with config.json, a config.json, {DEMO!r}, or one of {', '.join(KNOWN_MODELS)}"
        raise ValueError(f"model: got {model!r}, but there is no file {path}, allowed: {allowed}")
    return _read_json(path)


def read_images(model: str) -> Mapping[str, Any]:
    """Settings of the image processor next to the config.json that `model` names; empty where there are none.

    Args:
        model: as for `read_config`.

    Raises:
        ValueError: a file is not a JSON object.
        OSError: a file cannot be read.
    """
    if model in KNOWN_MODELS or model == DEMO:
        return {}
    path = Path(model)
    folder = path if path.is_dir() else path.parent
    for name, section in (("preprocessor_config.json", None), ("processor_config.json", "image_processor")):
        if (folder / name).is_file():
            content = _read_json(folder / name)
            settings = content if section is None else content.get(section)
            if isinstance(settings, dict):
                return settings
    return {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of too many digits
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model: {path} holds a {type(content).__name__}, allowed: a JSON object")
    return content


def _server_plan(config: FicocoConfig, tower: TowerShape, hf_config: Any) -> ServerPlan:
    planner = VisionPlanner(config, tower)
    served = config.decoder_method is not None or config.method in (*planner.methods, *CONTROLS)
    if served:
        return ServerPlan.of(config, hf_config)
    # No server can run this plan, but its counts are known.
    planner.check(planner.default)
    return ServerPlan(config, planner, None, hf_config.get_text_config().num_hidden_layers)


def _tile_report(size: tuple[int, int], tokens: TokenPlan, stock: TokenPlan) -> dict[str, Any]:
    height, width = size
    return {
        "image_size": [width, height],
        "image_tokens": stock.decoder[0],
        "tiles": [{"patches": tile.entering, "kept": tile.kept} for tile in tokens.tiles],
    }


def _costs(cost: Estimate) -> dict[str, Any]:
    totals = {name: getattr(cost, name) for name in ("total_flops", "kv_bytes", "memory_bytes")}
    return {**asdict(cost), "kv_bytes_per_layer": list(cost.kv_bytes_per_layer), **totals}


def _device(name: str) -> Device:
    if name != CPU:
        return reached(DEVICES[name])
    from ficoco_vllm.benchmarks.harness.device import measure

    return measure(where=CPU)


def _device_report(
    shape: ModelShape,
    tokens: TokenPlan,
    stock: TokenPlan,
    device: Device,
    prompt: Mapping[str, Any],
    num_output_tokens: int,
) -> dict[str, Any]:
    times = (
        predict(shape, plan, device, num_output_tokens=num_output_tokens, **prompt)
        for plan in (tokens, stock)
    )
    reduced, unreduced = ({**asdict(one), "ttft_seconds": one.ttft_seconds} for one in times)
    predicted = {"num_output_tokens": num_output_tokens, "reduced": reduced, "unreduced": unreduced}
    return {"device": asdict(device), "predicted": predicted}


def _device_lines(report: Mapping[str, Any]) -> list[str]:
    device, predicted = report["device"], report["predicted"]
    lines = [
        "",
        f"On {device['name']}, at least ({device['source']}; {predicted['num_output_tokens']} output tokens)",
    ]
    for label, field, unit in _TIMES:
        before, after = (predicted[side][field] / unit for side in ("unreduced", "reduced"))
        ratio = before / after if label.endswith("ms") else after / max(before, 1e-9)
        digits = 0 if field == "num_concurrent" else 2
        better = f"{ratio:>9.2f}x" if before else ""
        lines.append(f"{label:<26}{before:>14.{digits}f}{after:>16.{digits}f}{better}")
    return lines


def _demo_folder() -> Path:
    return Path(import_module("ficoco_vllm.demo_model").path())


def _check_pinpoints(config: Mapping[str, Any]) -> None:
    given = config.get("image_grid_pinpoints")
    side = config["vision_config"].get("image_size")
    try:
        pinpoints = tuple((int(height), int(width)) for height, width in given or ())
    except (TypeError, ValueError):
        pinpoints = ()
    if not pinpoints or any(length < side or length % side for size in pinpoints for length in size):
        raise ValueError(
            f"image_grid_pinpoints: got {given!r}, allowed: pairs of height and width, multiples of image_size = {side}"
        )


def _tiles(report: Mapping[str, Any]) -> list[str]:
    width, height = report["image_size"]
    tiles = report["tiles"]
    if len(tiles) == 1:
        kept = f"keeps {tiles[0]['kept']} of {report['image_tokens']}"
    elif all(tile == tiles[0] for tile in tiles):
        kept = f"has {len(tiles)} tiles, each of which keeps {tiles[0]['kept']} of {tiles[0]['patches']}"
    else:
        each = ", ".join(f"{tile['kept']} of {tile['patches']}" for tile in tiles)
        kept = f"has {len(tiles)} tiles, which keep {each}"
    return [f"An image of {width} x {height} pixels {kept} visual tokens"]


def _runs(counts: Sequence[int]) -> list[str]:
    lines = []
    for count, run_of in groupby(enumerate(counts[:-1]), key=lambda pair: pair[1]):
        layers = [layer for layer, _ in run_of]
        name = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]}-{layers[-1]}"
        lines.append(f"  {name:<14}{count:>8}")
    return [*lines, f"  {'leaving':<14}{counts[-1]:>8}"]
