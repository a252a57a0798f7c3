"""`ficoco-vllm serve`: vLLM's OpenAI server, with our settings where the plugins read them."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.compat import is_cpu_build, multiplies_bfloat16, set_cpu_defaults, use_interpreter
from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.environment import (
    ELASTIC_PLUGIN,
    ENDPOINT_PLUGIN,
    MEDIA_CONNECTOR,
    enable_endpoint_plugin,
)
from ficoco_vllm.models import ARCHITECTURES
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.commands.arguments import fail
from ficoco_vllm.server.commands.serve_options import (
    add_arguments,
    apply_limits,
    counts_savings,
    read_settings,
    reduces_in_decoder,
    without_metrics,
)
from ficoco_vllm.server.elastic.defaults import check_elastic
from ficoco_vllm.server.elastic.settings import OPTION, ElasticSettings
from ficoco_vllm.server.lifecycle.cleanup import tidied
from ficoco_vllm.server.lifecycle.shared_metrics import MULTIPROC, shared_metrics, starts_several_servers
from ficoco_vllm.server.lifecycle.shutdown import Shutdown

HELP = "serve a model with vLLM's OpenAI-compatible server"


def add_parser(subparsers: Any) -> None:
    """Add the command to the list of commands; vLLM's parser reads its options."""
    subparsers.add_parser("serve", help=HELP, add_help=False)


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        arguments: command line, with `serve` first.

    Returns:
        The exit status: 2 for settings that are not allowed, 1 if the engine died, otherwise 0.
    """
    set_cpu_defaults()
    if reduces_in_decoder(arguments):
        use_interpreter()  # vLLM detects Triton when it is imported
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
    # A redirect could lead out of the allowed domains.
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    with (
        tidied(),
        shared_metrics(counts_savings(arguments)) as metrics_folder,
        tempfile.TemporaryDirectory(prefix="ficoco-elastic-", ignore_cleanup_errors=True) as elastic_folder,
    ):
        return _serve(arguments, metrics_folder, elastic_folder)


def _serve(arguments: Sequence[str], metrics_folder: str | None, elastic_folder: str) -> int:
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
    # vLLM hands `args` to every API server process.
    args.ficoco_elastic_folder = elastic_folder
    args.ficoco_shutdown = Shutdown()
    try:
        configure(args)
    except ValueError as error:
        return fail(str(error))
    if metrics_folder is not None and starts_several_servers(args):
        del os.environ[MULTIPROC]  # vLLM then creates a folder of its own, and would warn about ours
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    # A supervisor treats vLLM's exit status 0 as an intended stop. (Several API servers raise an error instead.)
    return int(bool(args.ficoco_shutdown.engine_died))


def configure(args: argparse.Namespace) -> None:
    """Turn our options into vLLM's, and check them against the model before it is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    from vllm.logger import init_logger

    model = args.model_tag or (args.model if "--model" in sys.argv else None)
    if model is None:
        _use_demo_model(args)
    elif args.dtype == "auto" and is_cpu_build() and not multiplies_bfloat16():
        init_logger("vllm.ficoco").warning(
            "This CPU has no instructions for bfloat16: --dtype float32 is about ten times as fast, with twice the "
            "memory."
        )
    settings = read_settings(args.ficoco_method, args.ficoco_keep, args.ficoco_config)
    settings = settings or (args.additional_config or {}).get(NAME) or {}
    apply_limits(args)
    elastic = None if args.ficoco_elastic is None else ElasticSettings.load(args.ficoco_elastic)
    if elastic is not None:
        settings = _prepare_elastic(args, elastic, settings)
    if args.ficoco_explain:
        if args.ficoco_explain_rate < 0:
            raise ValueError(
                f"--ficoco-explain-rate = {args.ficoco_explain_rate} is not allowed; allowed: 0 (no limit) and more"
            )
        settings = {**settings, "explain": True}
    if settings:
        enable_endpoint_plugin(ENDPOINT_PLUGIN)
        settings = without_metrics(settings) if args.ficoco_no_metrics else settings
        args.additional_config = {**(args.additional_config or {}), NAME: settings}
    if (args.additional_config or {}).get(NAME):
        _check_model(args, elastic)


def _use_demo_model(args: argparse.Namespace) -> None:
    """Serve the model that ships with the package, with settings for its size."""
    from ficoco_vllm import demo_model

    args.model_tag = str(demo_model.path())
    args.served_model_name = args.served_model_name or ["ficoco-demo"]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if is_cpu_build():
        # With a few million parameters, compiling takes longer than it saves, and 1 GiB holds dozens of full contexts.
        # Without a size vLLM requires nine tenths of the machine's memory to be free.
        args.enforce_eager = True
        if args.kv_cache_memory_bytes is None and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
            args.kv_cache_memory_bytes = 2**30
        # bfloat16, the type of its weights, rounds differently from CPU to CPU, which changes nearly tied answers.
        if args.dtype == "auto":
            args.dtype = "float32"


def _prepare_elastic(
    args: argparse.Namespace, elastic: ElasticSettings, settings: dict[str, Any]
) -> dict[str, Any]:
    """Enable the load-following budget.

    Returns:
        Our settings, with the smallest budget as the default, by which vLLM sizes its own budgets.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    if FicocoConfig.parse(settings).method is None:
        raise ValueError(f"{OPTION} needs a method; allowed: one of `ficoco-vllm methods` as --ficoco-method")
    if args.disable_log_stats:
        raise ValueError(f"--disable-log-stats is not allowed with {OPTION}, which follows these statistics")
    enable_endpoint_plugin(ELASTIC_PLUGIN)
    if settings.get("keep") is None and settings.get("kv_budget") is None:
        return {**settings, "keep": elastic.floor}
    return settings


def _check_model(args: argparse.Namespace, elastic: ElasticSettings | None = None) -> None:
    """Refuse a model that would be served without the requested reduction, and settings that do not fit the model."""
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
    if elastic is not None:
        check_elastic(elastic, settings, config, getattr(args, "ficoco_min_keep", None) or 1)
    ServerPlan.of(settings, config)
