"""Our options of `ficoco-vllm serve`, which are read before vLLM is imported."""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_BODY_BYTES, MAX_IMAGE_BYTES, MAX_PIXELS
from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.commands.arguments import names

# An explanation takes two chats without any cache.
DEFAULT_EXPLAIN_RATE = 20
# Value of vLLM's `--middleware`.
BODY_LIMIT = "ficoco_vllm.server.media.body_limit.BodyLimit"
# MiB. A photograph has a few, and LLaVA shrinks it to 336 pixels; base64 adds a third in a body.
DEFAULT_MAX_IMAGE_MB = 20
DEFAULT_MAX_BODY_MB = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our options to those of vLLM's server."""
    group = parser.add_argument_group(
        "ficoco", "Reduction of visual tokens; without these options, stock vLLM."
    )
    group.add_argument("--ficoco-method", metavar="NAME", help="one of `ficoco-vllm methods`")
    group.add_argument(
        "--ficoco-keep", metavar="N", help="visual tokens kept of an image; requests may override it"
    )
    group.add_argument(
        "--ficoco-explain", action="store_true", help="serve POST /ficoco/explain and its page at /ficoco/"
    )
    group.add_argument(
        "--ficoco-explain-rate",
        type=int,
        default=DEFAULT_EXPLAIN_RATE,
        metavar="N",
        help="explanations a minute for each client and API server process, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--ficoco-min-keep", metavar="N", help="fewest visual tokens of an image that a request may name"
    )
    group.add_argument(
        "--ficoco-allow-methods",
        metavar="A,B",
        help="methods that a request may name, `off` for none at all (default: all that the server can run)",
    )
    group.add_argument(
        "--ficoco-max-image-pixels",
        metavar="N",
        help="pixels of the largest image that is decoded (default: Pillow's limit, 178956970)",
    )
    group.add_argument(
        "--ficoco-max-image-mb",
        default=str(DEFAULT_MAX_IMAGE_MB),
        metavar="N",
        help="largest encoded image in MiB, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--ficoco-max-body-mb",
        default=str(DEFAULT_MAX_BODY_MB),
        metavar="N",
        help="largest request body in MiB, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--ficoco-allow-private-media",
        action="store_true",
        help="let the allowed domains resolve to private addresses",
    )
    group.add_argument(
        "--ficoco-config", metavar="JSON|FILE", help="all settings, as a JSON object or a file with one"
    )
    group.add_argument(
        "--ficoco-elastic",
        metavar="JSON",
        help="budget that follows the load, for requests that name none, for example "
        """'{"floor": 64, "ceiling": 288, "target_kv_usage": 0.8}'""",
    )
    group.add_argument(
        "--ficoco-no-metrics", action="store_true", help="omit the savings of the reduction from /metrics"
    )


def apply_limits(args: argparse.Namespace) -> None:
    """Validate the operator's limits for requests, and put them where the server's processes read them.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    if args.ficoco_min_keep is not None:
        args.ficoco_min_keep = _count("--ficoco-min-keep", args.ficoco_min_keep, 1)
    if args.ficoco_max_image_pixels is not None:
        os.environ[MAX_PIXELS] = str(_count("--ficoco-max-image-pixels", args.ficoco_max_image_pixels, 2))
    os.environ[MAX_IMAGE_BYTES] = str(_count("--ficoco-max-image-mb", args.ficoco_max_image_mb, 0) * 2**20)
    os.environ[MAX_BODY_BYTES] = str(_count("--ficoco-max-body-mb", args.ficoco_max_body_mb, 0) * 2**20)
    args.middleware = [*(args.middleware or ()), BODY_LIMIT]
    if args.ficoco_allow_private_media:
        os.environ[ALLOW_PRIVATE_MEDIA] = "1"
    if args.ficoco_allow_methods is not None:
        allowed = names(args.ficoco_allow_methods)
        known = (*sorted({*available(), *PIPELINES}), "off")
        if not allowed or set(allowed) - set(known):
            raise ValueError(
                f"--ficoco-allow-methods = {args.ficoco_allow_methods!r} is not allowed; "
                f"allowed: of {', '.join(known)}, one at least"
            )
        args.ficoco_allow_methods = allowed


def _count(option: str, text: str, minimum: int) -> int:
    if not text.isdecimal() or int(text) < minimum:
        raise ValueError(f"{option} = {text!r} is not allowed; allowed: an integer of at least {minimum}")
    return int(text)


def reduces_in_decoder(arguments: Sequence[str]) -> bool:
    """Whether our options name a method of the decoder. Wrong options are reported later.

    Args:
        arguments: command line.
    """
    return _settings_of(arguments).decoder_method is not None


def counts_savings(arguments: Sequence[str]) -> bool:
    """Whether the server reduces and reports the savings at `/metrics`.

    Args:
        arguments: command line.
    """
    settings = _settings_of(arguments)
    return settings.method is not None and settings.metrics


def _settings_of(arguments: Sequence[str]) -> FicocoConfig:
    """Our settings, before vLLM is imported; none if they are wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--additional-config", "--additional_config", default="{}")
    ours, _ = parser.parse_known_args(list(arguments))
    try:
        settings = read_settings(ours.ficoco_method, ours.ficoco_keep, ours.ficoco_config)
        settings = settings or json.loads(ours.additional_config).get(NAME) or {}
        return FicocoConfig.parse(without_metrics(settings) if ours.ficoco_no_metrics else settings)
    except (ValueError, AttributeError):
        return FicocoConfig()


def without_metrics(settings: Any) -> Any:
    """Our settings with the metrics switched off."""
    return {**settings, "metrics": False} if isinstance(settings, dict) else settings


def read_settings(method: str | None, keep: str | None, config: str | None) -> dict[str, Any]:
    """Merge our options; `method` and `keep` override the same fields of `config`.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    settings = {} if config is None else FicocoConfig.load(config)
    if method is not None:
        settings["method"] = method
    if keep is not None:
        try:
            settings["keep"] = int(keep)
        except ValueError as error:
            raise ValueError(
                f"--ficoco-keep = {keep!r} is not allowed; allowed: an integer of at least 1"
            ) from error
    return settings
