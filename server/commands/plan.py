"""`ficoco-vllm plan`: what a method and a budget cost on a model, from its configuration alone."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from ficoco_vllm.reduction.cost import (
    BITS,
    KNOWN_MODELS,
    Budget,
    Estimate,
    estimate,
    model_shape,
    plan_tokens,
    speedup,
    unreduced,
)
from ficoco_vllm.reduction.schedule import KINDS
from ficoco_vllm.server.commands.arguments import fail
from ficoco_vllm.server.commands.plan_table import as_text
from ficoco_vllm.server.commands.plan_tiles import is_tiled, tiled_costs

DEMO = "demo"
# Raised whenever a field of the JSON output is renamed, removed or changes its meaning.
JSON_SCHEMA = 1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the `plan` subcommand.

    Args:
        subparsers: of the main command line.
    """
    parser = subparsers.add_parser(
        "plan",
        help="what a method and a budget cost on a model: tokens, TFLOPs, KV cache, memory, speed-up",
        description="Plan from a model's configuration alone: no weights, no vLLM, no GPU.",
    )
    known, names = ", ".join(KNOWN_MODELS), ", ".join(KINDS)
    both = (
        "for methods that reduce in tower and decoder, where the option without `encoder` means the decoder"
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        default=DEMO,
        metavar="MODEL",
        help=f"a folder with config.json, a config.json, or one of: {known} (default: {DEMO}, the demo model)",
    )
    add("--method", default="ficoco-v", help="a reduction method (default: %(default)s)")
    add("--keep", type=int, metavar="N", help="visual tokens of an image after the last reduction")
    add(
        "--kv-budget",
        type=float,
        metavar="N",
        help="instead of --keep: visual tokens a decoder layer, on average",
    )
    add("--text-tokens", type=int, default=60, metavar="M", help="text tokens (default: %(default)s)")
    add(
        "--images",
        type=int,
        default=1,
        metavar="I",
        help="images (default: %(default)s)",
    )
    add(
        "--image-size",
        metavar="WIDTHxHEIGHT",
        help="of the images of a LLaVA-NeXT, which cuts them into tiles (default: one of those with most tokens); its "
        "methods of the tower keep so many tokens of each tile, those of the decoder of each image",
    )
    add("--schedule", help=f"{names}, or LAYER:KEEP,LAYER:KEEP,... with layers counted from 0")
    add("--start-layer", type=int, metavar="L", help="first reducing layer, counted from 0")
    add("--encoder-keep", type=int, metavar="N", help=f"visual tokens that leave the tower; {both}")
    add("--encoder-schedule", help=f"as --schedule; {both}")
    add("--encoder-start-layer", type=int, metavar="L", help=f"as --start-layer; {both}")
    add(
        "--dtype",
        default="fp16",
        help=f"of weights, activations and KV cache: {', '.join(BITS)} (default: fp16)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


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
    shape = model_shape(config)
    prompt = {"num_text_tokens": args.text_tokens, "num_images": args.images, "dtype": args.dtype}
    if is_tiled(config):
        cost, stock, told = tiled_costs(args, config, shape, _budgets(args))
    else:
        if args.image_size is not None:
            raise ValueError(f"image_size: got {args.image_size!r}, allowed with a LLaVA-NeXT only")
        tokens = plan_tokens(shape, args.method, *_budgets(args))
        cost, stock = estimate(shape, tokens, **prompt), estimate(shape, unreduced(shape), **prompt)
        told = {
            "encoder_tokens": list(tokens.encoder),
            "decoder_visual_tokens": list(tokens.decoder),
            "mean_visual_tokens": tokens.mean_visual_tokens,
        }
    return {
        "schema": JSON_SCHEMA,
        "model": args.model,
        "method": args.method,
        **prompt,
        "num_patches": shape.tower.num_patches,
        **told,
        "reduced": _costs(cost),
        "unreduced": _costs(stock),
        "prefill_speedup": asdict(speedup(cost, stock)),
    }


def read_config(model: str) -> Mapping[str, Any]:
    """The content of the config.json that `model` stands for.

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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, a number of too many digits
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: {path} holds a {type(config).__name__}, allowed: a JSON object")
    return config


def parse_schedule(name: str, text: str | None) -> str | list[tuple[int, int]] | None:
    """Read a schedule option.

    Args:
        name: of the option, for the error message.
        text: the name of a schedule, "LAYER:KEEP,LAYER:KEEP,...", or None.

    Returns:
        The name, the pairs, or None.

    Raises:
        ValueError: it is neither.
    """
    if text is None or text in KINDS:
        return text
    try:
        pairs = [item.split(":") for item in text.split(",")]
        return [(int(layer), int(keep)) for layer, keep in pairs]
    except ValueError:
        allowed = f"{', '.join(KINDS)}, or LAYER:KEEP,LAYER:KEEP,..."
        raise ValueError(f"{name}: got {text!r}, allowed: {allowed}") from None


def _budgets(args: argparse.Namespace) -> tuple[Budget, Budget | None]:
    schedule = parse_schedule("schedule", args.schedule)
    budget = Budget(args.keep, args.kv_budget, schedule, args.start_layer)
    encoder_schedule = parse_schedule("encoder_schedule", args.encoder_schedule)
    encoder_budget = Budget(args.encoder_keep, None, encoder_schedule, args.encoder_start_layer)
    return budget, None if encoder_budget == Budget() else encoder_budget


def _costs(cost: Estimate) -> dict[str, Any]:
    totals = {name: getattr(cost, name) for name in ("total_flops", "kv_bytes", "memory_bytes")}
    return {**asdict(cost), "kv_bytes_per_layer": list(cost.kv_bytes_per_layer), **totals}


def _demo_folder() -> Path:
    return Path(import_module("ficoco_vllm.demo_model").path())
