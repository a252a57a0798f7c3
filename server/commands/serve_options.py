"""Our options of `ficoco-vllm serve`, which are read before vLLM is imported.

`serve --help` and shell completion take them from here: no import of torch at the top.
"""

import argparse
import difflib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_BODY_BYTES, MAX_IMAGE_BYTES, MAX_PIXELS, NAME
from ficoco_vllm.request_fields import check_keep_ratio
from ficoco_vllm.server.commands.arguments import integer, names
from ficoco_vllm.server.commands.vllm_options import has_all_options, light_parser

PROGRAM = "ficoco-vllm serve"
# Alternative forms of a budget; a server has one of them.
_BUDGETS = ("keep", "keep_ratio", "kv_budget")
# The setting that only the API server reads.
_QUALITY = "quality"
USAGE = f"{PROGRAM} [MODEL] [options]   (without MODEL: the demo model)"

# An explanation takes two chats without any cache.
DEFAULT_EXPLAIN_RATE = 20
# Value of vLLM's `--middleware`.
BODY_LIMIT = "ficoco_vllm.server.media.body_limit.BodyLimit"
# MiB. A photograph takes a few, and LLaVA shrinks it to 336 pixels; base64 adds a third in a body.
DEFAULT_MAX_IMAGE_MB = 20
DEFAULT_MAX_BODY_MB = 64


# Options of vLLM that `serve --help` names, with the name of their value.
_SELECTION = (
    ("--host", "ADDRESS", "address to listen on (default: all of this machine)"),
    ("--port", "N", "port to listen on (default: 8000)"),
    ("--api-key", "KEY", "key that clients must send"),
    ("--served-model-name", "NAME", "name of the model in requests"),
    ("--config", "FILE.yaml", "read options from a file"),
    ("--max-model-len", "N", "longest prompt with its answer, in tokens"),
    ("--dtype", "TYPE", "type of weights and activations"),
    ("--gpu-memory-utilization", "X", "share of the GPU's memory (default: 0.92)"),
    ("--tensor-parallel-size", "N", "GPUs that share a model"),
    ("--allowed-media-domains", "NAME", "domains from which images are fetched"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our options to those of vLLM's server."""
    group = parser.add_argument_group(
        "ficoco", "Reduction of visual tokens; without these options, stock vLLM."
    )
    group.add_argument(
        "--ficoco-method",
        metavar="NAME",
        help="one of `ficoco-vllm methods` (default with a budget: divprune)",
    )
    group.add_argument(
        "--ficoco-keep",
        metavar="N",
        help="visual tokens kept of an image; requests may override it (default with a method: a ninth)",
    )
    group.add_argument(
        "--ficoco-keep-ratio",
        metavar="R",
        help="instead of --ficoco-keep: a share of the visual tokens of each image, above 0, at most 1",
    )
    group.add_argument(
        "--ficoco-explain", action="store_true", help="serve POST /ficoco/explain and its page at /ficoco/"
    )
    group.add_argument(
        "--ficoco-explain-rate",
        metavar="N",
        help="explanations a minute for each client and API server process, 0 for no limit "
        f"(default: {DEFAULT_EXPLAIN_RATE})",
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
        "--ficoco-text-encoder",
        metavar="NAME|PATH",
        help="CLIP from which the model's vision tower came, whose text encoder reads the question for cdpruner, "
        "recoverable and trim (default: they compare the language model's embeddings)",
    )
    group.add_argument(
        "--ficoco-elastic",
        metavar="JSON",
        help="budget that follows the load, for requests that name none, for example "
        """'{"floor": 64, "ceiling": 288, "target_kv_usage": 0.8}'""",
    )
    group.add_argument(
        "--ficoco-target-agreement",
        metavar="X",
        help="find the budget for requests that name none: the smallest at which this share of the answers is the full "
        "model's, for example 0.98 (docs/quality.md)",
    )
    group.add_argument(
        "--ficoco-no-metrics", action="store_true", help="omit the savings of the reduction from /metrics"
    )
    group.add_argument("--verbose", action="store_true", help="show all that vLLM logs while it starts")


def print_help() -> None:
    """Print our options, and those of vLLM that most servers name."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        usage=USAGE,
        add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve a model with vLLM's OpenAI-compatible server. Options of ficoco-vllm first.",
        epilog=f"All options of vLLM: {PROGRAM} --help=all; one group: --help=Frontend, --help=ModelConfig, ...\n"
        "Spellings: --a-b, --a_b, --a=b, --json-option.key value, and --config FILE.yaml with the same names.",
    )
    add_arguments(parser)
    group = parser.add_argument_group("vLLM, a selection")
    for name, metavar, text in _SELECTION:
        group.add_argument(name, metavar=metavar, help=text)
    group.add_argument("-h", "--help", action="store_true", help="this help; --help=all for all options")
    print(parser.format_help(), end="")


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line without vLLM. Values of vLLM's options stay text.

    Args:
        arguments: command line after `serve`, expanded.

    Raises:
        ValueError: a file, a value or one of our options is wrong, or an option does not exist.
    """
    parser = light_parser(PROGRAM, USAGE)
    add_arguments(parser)
    try:
        options: argparse.Namespace = parser.parse_args(list(arguments))
    except (
        Exception
    ) as error:  # vLLM's parser may fail in any way: YAML that is not a mapping, a dotted option at the end
        raise ValueError(f"the options cannot be read: {error}") from error
    known = list(parser._option_string_actions)
    ours = [name for name in known if name.startswith("--ficoco-")]
    for argument in options.unknown:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--ficoco"):
            known = ours
        elif not name.startswith("-") or not has_all_options():
            continue  # vLLM's parser refuses it
        close = difflib.get_close_matches(name, known, n=3)
        everything = ", ".join(ours) if known is ours else f"those that {PROGRAM} --help=all lists"
        raise ValueError(f"{name} is not an option; allowed: {', '.join(close) or everything}")
    return options


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
    rate, args.ficoco_explain_rate = args.ficoco_explain_rate, DEFAULT_EXPLAIN_RATE
    if rate is not None:
        args.ficoco_explain_rate = _count("--ficoco-explain-rate", rate, 0)
        if not args.ficoco_explain:
            raise ValueError(
                f"--ficoco-explain-rate = {rate!r} is not allowed without --ficoco-explain, whose requests it limits"
            )
    if args.ficoco_allow_private_media:
        os.environ[ALLOW_PRIVATE_MEDIA] = "1"
    if args.ficoco_allow_methods is not None:
        from ficoco_vllm.reduction import registry

        allowed = names(args.ficoco_allow_methods)
        known = (*registry.names(), "off")
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


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Our settings, from all options that name them: `--ficoco-method` and the like override `--ficoco-config`, which
    overrides `--additional-config`. A budget replaces any budget below it.

    Args:
        args: options, read by vLLM's parser or by the light one, which leaves JSON as text.

    Returns:
        The settings of the engine, not yet validated; see `quality_of` for the rest.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    return {name: value for name, value in _all_settings(args).items() if name != _QUALITY}


def quality_of(args: argparse.Namespace) -> Any:
    """Settings of the target agreement, from `--ficoco-config` and `--ficoco-target-agreement`, which overrides it.

    Args:
        args: as for `settings_of`.

    Returns:
        The settings, not yet validated; None without a target.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    values = _all_settings(args).get(_QUALITY)
    text = args.ficoco_target_agreement
    if text is None or not isinstance(values, dict | None):
        return values
    try:
        return {**(values or {}), "target_agreement": float(text)}
    except ValueError as error:
        raise ValueError(
            f"--ficoco-target-agreement = {text!r} is not allowed; allowed: a number above 0, below 1"
        ) from error


def _all_settings(args: argparse.Namespace) -> dict[str, Any]:
    additional = args.additional_config
    if isinstance(additional, str):
        try:
            additional = json.loads(additional)
        except json.JSONDecodeError as error:
            raise ValueError(f"--additional-config = {additional!r} is not valid JSON ({error})") from error
    settings = additional.get(NAME) if isinstance(additional, dict) else None
    if not isinstance(settings, dict | None):
        raise ValueError(
            f"--additional-config: {NAME} = {settings!r} is not allowed; allowed: an object of settings"
        )
    ours = read_settings(args.ficoco_method, args.ficoco_keep, args.ficoco_config, args.ficoco_keep_ratio)
    if args.ficoco_text_encoder is not None:
        ours["text_encoder"] = args.ficoco_text_encoder
    settings = _override(settings or {}, ours)
    return {**settings, "metrics": False} if settings and args.ficoco_no_metrics else settings


def _override(settings: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under those of a higher level, where a budget of any kind replaces all budgets below it."""
    if any(upper.get(name) is not None for name in _BUDGETS):
        settings = {name: value for name, value in settings.items() if name not in _BUDGETS}
    return {**settings, **upper}


def read_settings(
    method: str | None, keep: str | None, config: str | None, keep_ratio: str | None = None
) -> dict[str, Any]:
    """Merge our options; `method`, `keep` and `keep_ratio` override `config`.

    Returns:
        The settings, not yet validated. A `keep` that is not an integer stays text.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    settings: dict[str, Any] = {}
    if method is not None:
        settings["method"] = method
    if keep is not None:
        settings["keep"] = integer(keep)
    if keep_ratio is not None:
        try:
            settings["keep_ratio"] = check_keep_ratio(float(keep_ratio))
        except ValueError as error:
            raise ValueError(
                f"--ficoco-keep-ratio = {keep_ratio!r} is not allowed; allowed: a number above 0, at most 1"
            ) from error
    return settings if config is None else _override(load_config(config), settings)


def load_config(text: str) -> dict[str, Any]:
    """Read the value of `--ficoco-config`.

    Args:
        text: a JSON object, or the path of a file that holds one.

    Returns:
        The settings, not yet validated.

    Raises:
        ValueError: the file cannot be read, or the text is no JSON object.
    """
    origin = "the text given"
    if not text.lstrip().startswith("{"):
        origin = f"the file {text}"
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--ficoco-config: {origin} cannot be read ({error})") from error
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--ficoco-config: {origin} is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"--ficoco-config: {origin} holds {type(values).__name__}, not a JSON object")
    return values
