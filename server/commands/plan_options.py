"""The options of `ficoco-vllm plan`, as settings of a server."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import Any

from ficoco_vllm.config import DEFAULT_METHOD, FicocoConfig
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.cost import BITS, DEVICES, KNOWN_MODELS
from ficoco_vllm.reduction.cost.shapes import DecoderShape
from ficoco_vllm.reduction.method import Method
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.schedule import KINDS
from ficoco_vllm.request_fields import check_keep_ratio
from ficoco_vllm.server.commands.arguments import integer

DEMO, CPU = "demo", "cpu"
Pairs = Sequence[tuple[int, int]]


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the `plan` subcommand.

    Args:
        subparsers: subparsers of the main command line.
    """
    parser = subparsers.add_parser(
        "plan",
        help="compute the cost of a method and a budget on a model: tokens, TFLOPs, KV cache, memory, speed-up",
        description="Plan a server with these settings from a model's configuration alone: no weights, no "
        "vLLM, no GPU.",
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
    add("--method", default=DEFAULT_METHOD, help="a reduction method (default: %(default)s)")
    add(
        "--keep",
        type=integer,
        metavar="N",
        help="visual tokens of an image after the last reduction (default: the server's, a ninth)",
    )
    add(
        "--kv-budget",
        type=float,
        metavar="N",
        help="instead of --keep: visual tokens in a decoder layer, on average",
    )
    add(
        "--keep-ratio",
        type=float,
        metavar="R",
        help="instead of --keep, for methods of the tower: a share of the image's visual tokens",
    )
    add("--text-tokens", type=int, default=60, metavar="M", help="text tokens (default: %(default)s)")
    add("--images", type=int, default=1, metavar="I", help="images (default: %(default)s)")
    add(
        "--image-size",
        metavar="WIDTHxHEIGHT",
        help="size of the images, where it decides the number of tokens (tiles, dynamic resolution; default: one with "
        "most tokens); methods of the tower keep N tokens of each tile, those of the decoder N of each image",
    )
    add("--schedule", help=f"{names}, or LAYER:KEEP,LAYER:KEEP,... with layers counted from 0")
    add("--start-layer", type=int, metavar="L", help="first reducing layer, counted from 0")
    add("--encoder-keep", type=int, metavar="N", help=f"visual tokens that leave the tower; {both}")
    add("--encoder-schedule", help=f"as --schedule; {both}")
    add("--encoder-start-layer", type=int, metavar="L", help=f"as --start-layer; {both}")
    add(
        "--dtype",
        default="fp16",
        help=f"data type of weights, activations and KV cache: {', '.join(BITS)} (default: fp16)",
    )
    add(
        "--device",
        choices=[CPU, *sorted(DEVICES)],
        help="also predict least times, concurrency and throughput on one such device; cpu is this machine's, whose "
        "ceilings are measured in a second",
    )
    add(
        "--output-tokens",
        type=int,
        default=128,
        metavar="T",
        help="of an answer, for --device (default: %(default)s)",
    )
    add("--json", action="store_true", help="print JSON instead of a table")


def settings(args: argparse.Namespace, tower: TowerShape, decoder: DecoderShape) -> FicocoConfig:
    """The options as settings of a server.

    Args:
        args: parsed by the parser of `add_parser`.
        tower: tower of the model.
        decoder: decoder of the model.

    Raises:
        ValueError: an option is wrong, or no server supports it.
    """
    if args.method in CONTROLS:
        return _of_control(args)
    pipeline = PIPELINES.get(args.method)
    method = pipeline.decoder if pipeline else get(args.method)
    num_units = tower.num_units
    parts = [Site("", method, args.keep, parse_schedule("schedule", args.schedule), args.start_layer)]
    encoder_schedule = parse_schedule("encoder_schedule", args.encoder_schedule)
    encoder = (args.encoder_keep, encoder_schedule, args.encoder_start_layer)
    if pipeline is None and encoder != (None, None, None):
        raise ValueError(
            f"encoder_keep, encoder_schedule, encoder_start_layer: allowed for {', '.join(PIPELINES)}"
        )
    if pipeline is not None:
        parts.append(Site("encoder_", pipeline.encoder, *encoder))
    for part in parts:
        if tower.tiling is not None and part.pairs:
            raise ValueError(
                f"{part.prefix}schedule: got LAYER:KEEP, allowed with this model, whose images begin with different "
                f"numbers of tokens: {', '.join(KINDS)}"
            )
    values: dict[str, Any] = {"method": args.method}
    if pipeline is not None:
        values["encoder"] = parts[1].settings(num_units, tower.num_executed_layers)
    if method.site == "decoder":
        final = {} if parts[0].keep is None else {"keep": max(1, parts[0].keep)}
        in_tower = FicocoConfig.parse({**values, **final}).tower_part(num_units, tower.dynamic)
        entering = VisionPlanner(in_tower, tower).default.keep
        values |= parts[0].settings(entering, decoder.num_layers)
    else:
        values |= parts[0].settings(num_units, tower.num_executed_layers)
    if args.kv_budget is not None:
        if not (isfinite(args.kv_budget) and args.kv_budget >= 1):
            raise ValueError(f"kv_budget: got {args.kv_budget}, allowed: a number of at least 1")
        if "keep" in values:
            raise ValueError("kv_budget: allowed without keep, and with a named schedule only")
        # The tower's output is in every decoder layer, so budget and average are equal.
        in_decoder = method.site == "decoder"
        values |= {"kv_budget": args.kv_budget} if in_decoder else {"keep": floor(args.kv_budget)}
    return FicocoConfig.parse({**values, **_ratio(args)})


def _of_control(args: argparse.Namespace) -> FicocoConfig:
    """The options of a control, which has a budget and nothing else."""
    given = (
        "schedule",
        "start_layer",
        "encoder_keep",
        "encoder_schedule",
        "encoder_start_layer",
        "kv_budget",
    )
    for name in given:
        if getattr(args, name) is not None:
            raise ValueError(
                f"{name}: got {getattr(args, name)!r}, allowed with {args.method}: keep, keep_ratio"
            )
    keep = {} if args.keep is None else {"keep": args.keep}
    return FicocoConfig.parse({"method": args.method, **keep, **_ratio(args)})


def _ratio(args: argparse.Namespace) -> dict[str, float]:
    return {} if args.keep_ratio is None else {"keep_ratio": check_keep_ratio(args.keep_ratio)}


@dataclass(frozen=True)
class Site:
    """The options of one site."""

    prefix: str
    method: Method
    final: int | None
    schedule: str | Pairs | None
    start_layer: int | None

    @property
    def pairs(self) -> Pairs:
        """Reducing layers and the tokens left after each, if the schedule names them."""
        return () if isinstance(self.schedule, str | None) else self.schedule

    @property
    def keep(self) -> int | None:
        """Tokens at the end."""
        return self.pairs[-1][1] if self.pairs else self.final

    def settings(self, entering: int, num_layers: int) -> dict[str, Any]:
        """The options as settings of a server.

        Args:
            entering: tokens that enter the first layer.
            num_layers: number of layers of the site.
        """
        given = {"keep": self.keep, "start_layer": self.start_layer}
        values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        in_decoder = self.method.site == "decoder"
        if self.pairs:
            if self.final not in (None, self.keep):
                raise ValueError(
                    f"{self.prefix}keep: got {self.final}, allowed: {self.keep}, where the schedule ends, or none"
                )
            last = num_layers - 2 if in_decoder else num_layers - 1
            removed = _removed(f"{self.prefix}schedule", self.pairs, entering, last, self.method.num_extra)
            if in_decoder:
                return values | {"layers": list(removed), "schedule": list(removed.values())}
            start = min(removed)
            counts = [removed.get(layer, 0) for layer in range(start, num_layers)]
            return values | {"start_layer": start, "schedule": counts}
        if self.schedule is not None:
            values["schedule"] = self.schedule
        if self.start_layer is not None and in_decoder:
            values["layers"] = None  # a method's own layers would take precedence over the start layer
        return values


def _removed(name: str, pairs: Pairs, entering: int, last: int, num_extra: int) -> dict[int, int]:
    """Tokens that each layer removes, from the number left after it."""
    removed: dict[int, int] = {}
    before = entering
    for layer, left in pairs:
        least = max(removed, default=-1) + 1
        if not least <= layer <= last:
            raise ValueError(f"{name}: got layer {layer}, allowed: {least} to {last}, ascending")
        if not 1 <= left <= before:
            raise ValueError(f"{name}: got {left} left after layer {layer}, allowed: 1 to {before}")
        removed[layer] = before - left + num_extra if left < before else 0
        before = left
    return removed


def parse_schedule(name: str, text: str | None) -> str | Pairs | None:
    """Read a schedule option.

    Args:
        name: name of the option, for the error message.
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
        return tuple((int(layer), int(keep)) for layer, keep in pairs)
    except ValueError:
        allowed = f"{', '.join(KINDS)}, or LAYER:KEEP,LAYER:KEEP,..."
        raise ValueError(f"{name}: got {text!r}, allowed: {allowed}") from None


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Height and width of an image from WIDTHxHEIGHT."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (
        width.isdecimal() and height.isdecimal() and 1 <= int(width) <= 2**16 and 1 <= int(height) <= 2**16
    ):
        raise ValueError(f"image_size: got {text!r}, allowed: WIDTHxHEIGHT in pixels, each 1 to {2**16}")
    return int(height), int(width)
