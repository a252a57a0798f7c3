"""`ficoco-vllm serve`: vLLM's OpenAI server, with our settings where the plugins read them."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ficoco_vllm.compat import (
    do_without_triton,
    is_cpu_build,
    multiplies_bfloat16,
    set_cpu_defaults,
    use_interpreter,
)
from ficoco_vllm.environment import (
    ENDPOINT_PLUGIN,
    MEDIA_CONNECTOR,
    NAME,
    QUIET,
    enable_endpoint_plugin,
)
from ficoco_vllm.server.commands.arguments import fail, names
from ficoco_vllm.server.commands.preflight import (
    as_hf_config,
    check_architecture,
    check_port,
    check_settings,
    read_model,
)
from ficoco_vllm.server.commands.serve_options import (
    BODY_LIMIT,
    PROGRAM,
    USAGE,
    add_arguments,
    apply_limits,
    print_help,
    quality_of,
    read_options,
    settings_of,
)
from ficoco_vllm.server.commands.vllm_options import expand

if TYPE_CHECKING:  # they import torch, which the first checks do not need
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.planning.server import ServerPlan
    from ficoco_vllm.quality.settings import QualitySettings
    from ficoco_vllm.server.elastic.settings import ElasticSettings
    from ficoco_vllm.server.lifecycle.ready import Progress


def main(arguments: Sequence[str]) -> int:
    """Serve until stopped.

    Args:
        arguments: command line after `serve`.

    Returns:
        The exit status: 2 for settings that are not allowed, 1 if the engine died, otherwise 0.
    """
    arguments = expand(arguments)
    if {"-h", "--help"} & set(arguments):
        print_help()
        return 0
    if any(argument.startswith("--help=") for argument in arguments):
        _vllm_parser().parse_args(arguments)  # prints and exits
    try:
        options = read_options(arguments)
        check_port(options)
        model = _model_of(options)
        architecture = read_model(model, options)
        check_settings(settings_of(options), architecture)
        requested = resolve_settings(options)
        apply_limits(options)
        hf_config = None if architecture is None else as_hf_config(architecture)
        if requested.settings and architecture is not None:
            check_architecture(model, architecture.get("architectures") or [])
        if requested.settings and hf_config is not None:
            make_plan(requested, hf_config, options)
    except (ValueError, ModuleNotFoundError) as error:
        return fail(str(error))
    return _start(arguments, options, requested.settings)


def _start(arguments: Sequence[str], options: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Set what vLLM reads when it is imported, then serve."""
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.server.lifecycle.cleanup import tidied
    from ficoco_vllm.server.lifecycle.interrupts import stop_at_once
    from ficoco_vllm.server.lifecycle.quiet import set_quiet
    from ficoco_vllm.server.lifecycle.ready import Progress
    from ficoco_vllm.server.lifecycle.shared_metrics import shared_metrics

    config = FicocoConfig.parse(settings)
    set_cpu_defaults()
    if config.decoder_method is not None:
        use_interpreter()  # vLLM detects Triton when it is imported
    else:
        do_without_triton()
    os.environ.setdefault("VLLM_MEDIA_CONNECTOR", MEDIA_CONNECTOR)
    # A redirect could lead out of the allowed domains.
    os.environ.setdefault("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    set_quiet(options)
    stop_at_once()
    progress = Progress()
    try:
        with (
            tidied(),
            shared_metrics(config.method is not None and config.metrics) as metrics_folder,
            tempfile.TemporaryDirectory(prefix="ficoco-server-", ignore_cleanup_errors=True) as folder,
        ):
            return _serve(arguments, metrics_folder, folder, progress)
    finally:
        progress.end()


def _serve(arguments: Sequence[str], metrics_folder: str | None, folder: str, progress: "Progress") -> int:
    progress.stage("importing vLLM")
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.plugins import load_general_plugins

    from ficoco_vllm.compat.versions import cli_env_setup
    from ficoco_vllm.hooks.engine_start import hook_engine_start
    from ficoco_vllm.server.lifecycle.shared_metrics import MULTIPROC, starts_several_servers
    from ficoco_vllm.server.lifecycle.shutdown import Shutdown

    cli_env_setup()
    load_general_plugins()
    command = ServeSubcommand()
    args = _vllm_parser().parse_args(list(arguments))
    # vLLM hands `args` to every API server process.
    args.ficoco_folder = folder
    args.ficoco_shutdown = Shutdown()
    try:
        plan = configure(args)
        if metrics_folder is not None and starts_several_servers(args):
            del os.environ[MULTIPROC]  # vLLM then creates a folder of its own, and would warn about ours
        configure_logging_from_args(args)
        command.validate(args)
        progress.stage("starting the engine: its processes import vLLM and load the model")
        if not args.headless:
            progress.announce(args, _in_words(plan, args))
        hook_engine_start(forwards_signals=args.data_parallel_multi_port_external_lb)
        command.cmd(args)
    except (ValueError, RuntimeError, OSError) as error:
        if args.verbose:
            raise
        status = 2 if isinstance(error, ValueError) else 1
        return fail(f"{_message(error)} (--verbose shows where)", status)
    print("ficoco-vllm: stopped", flush=True)
    # A supervisor treats vLLM's exit status 0 as an intended stop. (Several API servers raise an error instead.)
    return int(bool(args.ficoco_shutdown.engine_died))


def _vllm_parser() -> Any:
    """Parser of all options, ours and vLLM's. It reads the words after `serve`, where vLLM demands a model."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser, SortedHelpFormatter

    from ficoco_vllm.compat.versions import make_arg_parser

    class Formatter(SortedHelpFormatter):
        """Names defaults where there are some, once."""

        def _get_help_string(self, action: argparse.Action) -> str | None:
            named = action.default in (None, argparse.SUPPRESS) or "default" in (action.help or "")
            return action.help if named else str(super()._get_help_string(action))

    parser = FlexibleArgumentParser(prog=PROGRAM, usage=USAGE, formatter_class=Formatter)
    add_arguments(parser)
    make_arg_parser(parser)
    parser.set_defaults(model=None)  # vLLM's own default would hide that no model was named
    return parser


def _model_of(args: argparse.Namespace) -> str:
    """The model that was named, else the demo model."""
    from ficoco_vllm import demo_model

    return str(args.model_tag or args.model or demo_model.path())


class RequestedSettings(NamedTuple):
    """Settings that the command line requests.

    Attributes:
        settings: settings of the engine.
        elastic: settings of a budget that follows the load.
        quality: settings of a budget that holds a target.
    """

    settings: dict[str, Any]
    elastic: "ElasticSettings | None"
    quality: "QualitySettings | None"


def resolve_settings(args: argparse.Namespace) -> RequestedSettings:
    """Settings of the server, validated without a model.

    Args:
        args: options, from vLLM's parser or from the light one.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.quality.settings import OPTION as QUALITY
    from ficoco_vllm.quality.settings import QualitySettings
    from ficoco_vllm.server.elastic.settings import OPTION as ELASTIC
    from ficoco_vllm.server.elastic.settings import ElasticSettings

    settings, quality = settings_of(args), quality_of(args)
    requested = RequestedSettings(
        settings,
        None if args.ficoco_elastic is None else ElasticSettings.load(args.ficoco_elastic),
        None if quality is None else QualitySettings.parse(quality),
    )
    for option, moving in ((ELASTIC, requested.elastic), (QUALITY, requested.quality)):
        if moving is not None:
            _check_moving(option, settings, args)
    if requested.quality is not None:
        _check_quality(QUALITY, settings, args)
    if requested.elastic is not None and settings.get("keep") is None and settings.get("kv_budget") is None:
        # vLLM sizes its own budgets by the default.
        settings = {**settings, "keep": requested.elastic.floor}
    if args.ficoco_explain:
        settings = {**settings, "explain": True}
    FicocoConfig.parse(settings)
    return requested._replace(settings=settings)


def _check_moving(option: str, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse settings that contradict a moving budget.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    from ficoco_vllm.config import FicocoConfig

    if FicocoConfig.parse(settings).method is None:
        raise ValueError(f"{option} needs a method; allowed: one of `ficoco-vllm methods` as --ficoco-method")
    if args.disable_log_stats:
        raise ValueError(f"--disable-log-stats is not allowed with {option}, which follows these statistics")
    if settings.get("keep_ratio") is not None:
        raise ValueError(
            f"keep_ratio = {settings['keep_ratio']} is not allowed with {option}, whose budgets are numbers of "
            "tokens; allowed: keep, or neither"
        )


def _check_quality(option: str, settings: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse what contradicts a target agreement.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    if settings.get("keep") is not None:
        raise ValueError(
            f"keep = {settings['keep']} is not allowed with {option}, which finds it; allowed: a ladder of budgets in "
            "the setting quality"
        )
    allowed = args.ficoco_allow_methods
    if allowed is not None and "off" not in (names(allowed) if isinstance(allowed, str) else allowed):
        raise ValueError(
            f"--ficoco-allow-methods = {allowed!r} is not allowed with {option}, whose second answers keep all tokens; "
            "allowed: off among the names"
        )
    raw = "raw_logprobs"  # vLLM's default: before temperature and masks
    if args.logprobs_mode not in (None, raw):
        raise ValueError(
            f"--logprobs-mode = {args.logprobs_mode!r} is not allowed with {option}, which compares the probabilities "
            f"of two models; allowed: {raw}"
        )


def make_plan(requested: RequestedSettings, hf_config: Any, args: argparse.Namespace) -> "ServerPlan":
    """Plan the server.

    Raises:
        ValueError: the settings do not fit the model, naming the field, its value and what is allowed.
    """
    from ficoco_vllm.config import FicocoConfig
    from ficoco_vllm.planning.server import ServerPlan
    from ficoco_vllm.quality.states import check_state
    from ficoco_vllm.server.budget import check_budgets, most_tokens, on_server
    from ficoco_vllm.server.elastic.settings import OPTION as ELASTIC

    config = FicocoConfig.parse(requested.settings)
    min_keep = int(args.ficoco_min_keep or 1)
    if requested.elastic is not None:
        requested.elastic.check_bounds(min_keep, most_tokens(config, hf_config))
        check_budgets(ELASTIC, requested.elastic.budgets, config, hf_config)
    if requested.quality is not None:
        quality = on_server(requested.quality, config, hf_config, min_keep)
        check_state(quality, config.method or "")
    return ServerPlan.of(config, hf_config)


def configure(args: argparse.Namespace) -> "ServerPlan | None":
    """Turn our options into vLLM's, and check them against the model before it is loaded.

    Returns:
        The plan of a server that reduces.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    from vllm.logger import init_logger
    from vllm.transformers_utils.config import get_config
    from vllm.transformers_utils.processor import cached_get_image_processor

    from ficoco_vllm.planning.families import leave_image_settings

    if not (args.model_tag or args.model):
        _use_demo_model(args)
    elif args.dtype == "auto" and is_cpu_build() and not multiplies_bfloat16():
        init_logger("vllm.ficoco").warning(
            "This CPU has no instructions for bfloat16: --dtype float32 is about ten times as fast, with twice the "
            "memory."
        )
    args.model = args.model_tag = _model_of(args)
    apply_limits(args)
    args.middleware = [*(args.middleware or ()), BODY_LIMIT]
    if os.environ.get(QUIET):
        from ficoco_vllm.server.lifecycle.quiet import SERVING_LOG

        args.middleware.append(SERVING_LOG)
    requested = resolve_settings(args)
    if not requested.settings:
        return None
    args.ficoco_quality = quality_of(args)  # read by every API server process
    if requested.quality is not None and args.scheduling_policy == "fcfs":
        args.scheduling_policy = "priority"  # the same order, except for second answers, which come last
    enable_endpoint_plugin(ENDPOINT_PLUGIN)
    args.additional_config = {**(args.additional_config or {}), NAME: requested.settings}
    hf_config = get_config(args.model, trust_remote_code=args.trust_remote_code, revision=args.revision)
    check_architecture(args.model, list(getattr(hf_config, "architectures", None) or []))
    processor = partial(
        cached_get_image_processor,
        args.model,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    leave_image_settings(hf_config, args.mm_processor_kwargs or {}, processor)
    return make_plan(requested, hf_config, args)


def _use_demo_model(args: argparse.Namespace) -> None:
    """Serve the model that ships with the package, with settings for its size."""
    args.model_tag = _model_of(args)
    args.served_model_name = args.served_model_name or ["ficoco-demo"]
    args.use_tqdm_on_load = False  # it loads immediately
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


def _in_words(plan: "ServerPlan | None", args: argparse.Namespace) -> str:
    """Method and budget, for the block that ends the start."""
    if plan is None:
        return "none: stock vLLM (--ficoco-method and --ficoco-keep reduce the visual tokens)"
    config: FicocoConfig = plan.config
    moving = []
    if args.ficoco_quality is not None:
        target = args.ficoco_quality["target_agreement"]
        moving.append(f"the smallest budget that holds an agreement of {target} with the full model")
    if args.ficoco_elastic is not None:
        moving.append(f"a budget that follows the load: {args.ficoco_elastic}")
    if moving:
        return f"{config.method}, with {' or, where that is larger, '.join(moving)}"
    if config.kv_budget is not None:
        return (
            f"{config.method} keeps {config.kv_budget:g} visual tokens of an image on average over the layers"
        )
    tower = plan.tower
    if plan.decoder is None:
        return tower.in_words
    entering = tower.num_output_tokens(tower.default)
    kept = plan.decoder.keep_of(entering)
    return (
        f"{config.method} keeps {kept} of {plan.most} visual tokens of an image in the decoder's last layers"
    )


def _message(error: Exception) -> str:
    """Text of an error in one line."""
    errors = getattr(error, "errors", None)  # pydantic
    parts = [str(item["msg"]) for item in errors()] if callable(errors) else [str(error)]
    return " ".join(" ".join(parts).split())
