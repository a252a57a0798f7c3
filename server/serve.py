"""`ficoco-vllm serve`: vLLM's own OpenAI server with our settings put where the plugin reads them."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.compat import is_cpu_build, set_cpu_defaults, use_interpreter
from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.kv.plan import DecoderPlanner
from ficoco_vllm.plugin import ARCHITECTURES, MEDIA_CONNECTOR
from ficoco_vllm.server.plugins import allow_endpoint
from ficoco_vllm.vision.plan import VisionPlanner
from ficoco_vllm.vision.shape import TowerShape

# Each costs two chats that no cache helps.
DEFAULT_EXPLAIN_RATE = 20
HELP = "serve a model with vLLM's OpenAI-compatible server"


def add_parser(subparsers: Any) -> None:
    """Name the command in the list of commands; vLLM's parser reads its options."""
    subparsers.add_parser("serve", help=HELP, add_help=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our options to those of vLLM's server."""
    group = parser.add_argument_group("ficoco", "Reduction of visual tokens; without these, as stock vLLM.")
    group.add_argument("--ficoco-method", metavar="NAME", help="one of `ficoco-vllm methods`")
    group.add_argument(
        "--ficoco-keep", metavar="N", help="visual tokens kept of an image (a request may differ)"
    )
    group.add_argument(
        "--ficoco-explain", action="store_true", help="serve POST /ficoco/explain and its page at /ficoco/"
    )
    group.add_argument(
        "--ficoco-explain-rate",
        type=int,
        default=DEFAULT_EXPLAIN_RATE,
        metavar="N",
        help="explanations a minute of one client and API server process, 0 for no limit (default: %(default)s)",
    )
    group.add_argument(
        "--ficoco-config", metavar="JSON|FILE", help="all settings, as a JSON object or a file that holds one"
    )


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        arguments: of the command line, `serve` first.

    Returns:
        2 for settings that are not allowed; otherwise what vLLM's server leaves.
    """
    set_cpu_defaults()
    if reduces_in_decoder(arguments):
        use_interpreter()  # before vLLM is imported, which looks for Triton at once
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)

    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    load_general_plugins()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="ficoco-vllm")
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "ficoco-vllm serve [MODEL] [options]   (without MODEL: the demo model)"
    serve_parser.description = HELP
    add_arguments(serve_parser)
    args = parser.parse_args(list(arguments))
    try:
        configure(args)
    except ValueError as error:
        print(f"ficoco-vllm: error: {error}", file=sys.stderr)
        return 2
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


def configure(args: argparse.Namespace) -> None:
    """Turn our options into vLLM's, and check them against the model before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    model = args.model_tag or (args.model if "--model" in sys.argv else None)
    if model is None:
        _use_demo_model(args)
    settings = read_settings(args.ficoco_method, args.ficoco_keep, args.ficoco_config)
    if args.ficoco_explain:
        if args.ficoco_explain_rate < 0:
            raise ValueError(
                f"--ficoco-explain-rate = {args.ficoco_explain_rate} is not allowed; allowed: 0 (no limit) and more"
            )
        settings["explain"] = True
        allow_endpoint()
    if settings:
        args.additional_config = {**(args.additional_config or {}), NAME: settings}
    if (args.additional_config or {}).get(NAME):
        _check_model(args)


def reduces_in_decoder(arguments: Sequence[str]) -> bool:
    """Whether our options name a method that works in the decoder; options that are wrong are reported later.

    Args:
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    ours, _ = parser.parse_known_args(list(arguments))
    try:
        settings = FicocoConfig.parse(read_settings(ours.ficoco_method, None, ours.ficoco_config))
    except ValueError:
        return False
    return settings.decoder_method is not None


def read_settings(method: str | None, keep: str | None, config: str | None) -> dict[str, Any]:
    """Our options as one mapping; `method` and `keep` win over the same fields of `config`.

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


def _use_demo_model(args: argparse.Namespace) -> None:
    """Serve the model that ships with the package, with what suits its size."""
    from ficoco_vllm import demo_model

    args.model_tag = str(demo_model.path())
    args.served_model_name = args.served_model_name or ["ficoco-demo"]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if is_cpu_build():
        # A few million parameters: compiling takes longer than it saves, and 1 GiB holds a hundred full contexts.
        # Without a size vLLM wants nine tenths of the machine's memory to be free.
        args.enforce_eager = True
        if args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            args.kv_cache_memory_bytes = 2**30


def _check_model(args: argparse.Namespace) -> None:
    """Refuse a model that would be served without the reduction that was asked for, and settings that do not fit it."""
    from vllm.transformers_utils.config import get_config

    model = args.model_tag or args.model
    config = get_config(model, trust_remote_code=args.trust_remote_code, revision=args.revision)
    architectures = list(getattr(config, "architectures", None) or [])
    if not set(architectures) & set(ARCHITECTURES):
        raise ValueError(
            f"model = {model!r} has the architecture {', '.join(architectures) or 'none'}, "
            f"whose visual tokens cannot be reduced; allowed: {', '.join(ARCHITECTURES)}"
        )
    settings = FicocoConfig.parse(args.additional_config[NAME])
    tower = VisionPlanner.shared(settings, TowerShape.from_hf_config(config))
    if settings.decoder_method is not None:
        num_layers = config.get_text_config().num_hidden_layers
        DecoderPlanner.shared(settings, num_layers, tower.num_output_tokens(tower.default))
