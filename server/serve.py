"""`ficoco-vllm serve`: vLLM's own OpenAI server with our settings put where the plugin reads them."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ficoco_vllm.compat import is_cpu_build, set_cpu_defaults, use_interpreter
from ficoco_vllm.config import NAME, FicocoConfig
from ficoco_vllm.plugin import ARCHITECTURES, MAX_PIXELS, MEDIA_CONNECTOR
from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.elastic.settings import OPTION, ElasticSettings
from ficoco_vllm.server.elastic.sites import Sites, check_elastic
from ficoco_vllm.server.plugins import allow_endpoint

# Entry point of `server.elastic.plugin`.
ELASTIC_PLUGIN = "ficoco_elastic"
# prometheus_client's name for the folder that processes share.
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"
# Each explanation costs two chats that no cache helps.
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
        "--ficoco-min-keep", metavar="N", help="fewest visual tokens of an image that a request may ask for"
    )
    group.add_argument(
        "--ficoco-allow-methods",
        metavar="A,B",
        help="methods that a request may name, `off` for none at all (default: all that the server can run)",
    )
    group.add_argument(
        "--ficoco-max-image-pixels",
        metavar="N",
        help="largest image that is unpacked (default: Pillow's limit, 178956970)",
    )
    group.add_argument(
        "--ficoco-config", metavar="JSON|FILE", help="all settings, as a JSON object or a file that holds one"
    )
    group.add_argument(
        "--ficoco-elastic",
        metavar="JSON",
        help="let the budget of requests that name none follow the load, for example "
        """'{"floor": 64, "ceiling": 288, "target_kv_usage": 0.8}'""",
    )
    group.add_argument(
        "--ficoco-no-metrics", action="store_true", help="leave what the reduction saves out of /metrics"
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
    os.environ.setdefault(
        "VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0"
    )  # a redirect leads out of the allowed domains
    with (
        shared_metrics(counts_savings(arguments)) as folder,
        tempfile.TemporaryDirectory(prefix="ficoco-elastic-", ignore_cleanup_errors=True) as elastic_folder,
    ):
        return _serve(arguments, folder, elastic_folder)


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
    args.ficoco_elastic_folder = elastic_folder  # every API server process is given `args`
    try:
        configure(args)
    except ValueError as error:
        print(f"ficoco-vllm: error: {error}", file=sys.stderr)
        return 2
    if metrics_folder is not None and several_servers(args):
        del os.environ[MULTIPROC]  # vLLM makes such a folder itself then, and would warn of ours
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


@contextmanager
def shared_metrics(wanted: bool) -> Iterator[str | None]:
    """Let engine core and workers count into the `/metrics` of the API server.

    prometheus_client adds up what several processes count if a folder is named before it is imported. vLLM names
    one only for several API servers; a folder that the user has named stays.

    Args:
        wanted: whether there is anything to share.

    Yields:
        The folder, None where it is not ours.
    """
    if not wanted or MULTIPROC in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ficoco-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ[MULTIPROC] = folder
        try:
            yield folder
        finally:
            if os.environ.get(MULTIPROC) == folder:  # else whatever this process starts next looks for it
                del os.environ[MULTIPROC]


def several_servers(args: argparse.Namespace) -> bool:
    """Whether vLLM will start several API servers.

    Args:
        args: of vLLM's parser.
    """
    if args.api_server_count is not None:
        return bool(args.api_server_count > 1)
    balanced_outside = (
        args.data_parallel_external_lb
        or args.data_parallel_hybrid_lb
        or args.data_parallel_multi_port_external_lb
        or args.data_parallel_rank is not None
        or args.data_parallel_start_rank is not None
    )
    return bool(args.data_parallel_size > 1 and not balanced_outside)


def configure(args: argparse.Namespace) -> None:
    """Turn our options into vLLM's, and check them against the model before anything is loaded.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    model = args.model_tag or (args.model if "--model" in sys.argv else None)
    if model is None:
        _use_demo_model(args)
    settings = read_settings(args.ficoco_method, args.ficoco_keep, args.ficoco_config)
    settings = settings or (args.additional_config or {}).get(NAME) or {}
    _read_bounds(args)
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
        allow_endpoint()
        settings = _without_metrics(settings) if args.ficoco_no_metrics else settings
        args.additional_config = {**(args.additional_config or {}), NAME: settings}
    if (args.additional_config or {}).get(NAME):
        _check_model(args, elastic)


def _count(option: str, text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{option} = {text!r} is not allowed; allowed: an integer of at least {least}")
    return int(text)


def _read_bounds(args: argparse.Namespace) -> None:
    """Read what the operator lets requests ask for.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    if args.ficoco_min_keep is not None:
        args.ficoco_min_keep = _count("--ficoco-min-keep", args.ficoco_min_keep, 1)
    if args.ficoco_max_image_pixels is not None:
        os.environ[MAX_PIXELS] = str(_count("--ficoco-max-image-pixels", args.ficoco_max_image_pixels, 2))
    if args.ficoco_allow_methods is not None:
        names = tuple(name.strip() for name in args.ficoco_allow_methods.split(",") if name.strip())
        known = (*sorted({*available(), *PIPELINES}), "off")
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            raise ValueError(
                f"--ficoco-allow-methods = {args.ficoco_allow_methods!r} is not allowed; "
                f"allowed: of {', '.join(known)}, one at least"
            )
        args.ficoco_allow_methods = names


def reduces_in_decoder(arguments: Sequence[str]) -> bool:
    """Whether our options name a method that works in the decoder; options that are wrong are reported later.

    Args:
        arguments: of the command line.
    """
    return _settings_of(arguments).decoder_method is not None


def counts_savings(arguments: Sequence[str]) -> bool:
    """Whether the server reduces and tells at `/metrics` what that saves.

    Args:
        arguments: of the command line.
    """
    settings = _settings_of(arguments)
    return settings.method is not None and settings.metrics


def _settings_of(arguments: Sequence[str]) -> FicocoConfig:
    """Our settings before vLLM is imported; none where they are wrong."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    parser.add_argument("--additional-config", "--additional_config", default="{}")
    ours, _ = parser.parse_known_args(list(arguments))
    try:
        settings = read_settings(ours.ficoco_method, ours.ficoco_keep, ours.ficoco_config)
        settings = settings or json.loads(ours.additional_config).get(NAME) or {}
        return FicocoConfig.parse(_without_metrics(settings) if ours.ficoco_no_metrics else settings)
    except (ValueError, AttributeError):
        return FicocoConfig()


def _without_metrics(settings: Any) -> Any:
    return {**settings, "metrics": False} if isinstance(settings, dict) else settings


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


def _prepare_elastic(
    args: argparse.Namespace, elastic: ElasticSettings, settings: dict[str, Any]
) -> dict[str, Any]:
    """What a budget that follows the load needs of the rest.

    Returns:
        Our settings, with the smallest budget as the one that vLLM's own budgets are made for.

    Raises:
        ValueError: naming the option and what is allowed.
    """
    if FicocoConfig.parse(settings).method is None:
        raise ValueError(f"{OPTION} needs a method; allowed: one of `ficoco-vllm methods` as --ficoco-method")
    if args.disable_log_stats:
        raise ValueError(f"--disable-log-stats is not allowed with {OPTION}, which follows these statistics")
    allow_endpoint(ELASTIC_PLUGIN)
    if settings.get("keep") is None and settings.get("kv_budget") is None:
        return {**settings, "keep": elastic.floor}
    return settings


def _check_model(args: argparse.Namespace, elastic: ElasticSettings | None = None) -> None:
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
    if elastic is not None:
        check_elastic(elastic, settings, config, getattr(args, "ficoco_min_keep", None) or 1)
    Sites.of(settings, config)
