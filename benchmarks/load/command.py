"""`ficoco-vllm bench load` and `make bench-load`: the command."""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment

if TYPE_CHECKING:
    from ficoco_vllm.benchmarks.load.settings import Server, Traffic, Turn

DEMO = "demo"
WIDE = "llava-1.5-7b-width"
# For the demo model and `WIDE`: the cache holds a dozen of stock vLLM's requests, so that requests compete for it.
_STOCK_REQUESTS = 12
_STOCK_VISUAL_TOKENS = 576
_BLOCK = 32
_DEFAULT_SERVERS = ("stock", "ficoco-v:64", "ficoco-v:192")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options, beside those that all benchmarks of a server share."""
    add = parser.add_argument
    add(
        "--model",
        default=DEMO,
        help=f"a folder or name that vLLM serves; {DEMO!r}: the demo model; {WIDE!r}: LLaVA-1.5-7B's shapes with "
        "--layers decoder layers and random weights (default: %(default)s)",
    )
    add("--layers", type=int, default=2, help=f"decoder layers of {WIDE!r} (default: %(default)s)")
    add("--served-model-name", help="name of the model in requests (default with --url: the server's first)")
    add(
        "--tokenizer",
        help="folder or name, for prompts of a known length (default: the model; with --url the server's /tokenize)",
    )
    add("--servers", nargs="+", default=list(_DEFAULT_SERVERS), help="stock, METHOD or METHOD:KEEP, each")
    add("--rates", nargs="*", default=[], help="requests a second, one point each")
    add("--concurrency", nargs="*", type=int, default=[4, 16], help="concurrent requests, one point each")
    add("--requests", type=int, default=64, help="of a point (default: %(default)s)")
    add("--text-tokens", type=int, default=60, help="of a prompt, beside its image (default: %(default)s)")
    add("--answer-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    add("--image-side", type=int, default=336, help="pixels (default: %(default)s)")
    add("--rounds", type=int, default=2, help="turns of each server (default: %(default)s)")
    add("--sample-seconds", type=float, default=0.5, help="between two reads of /metrics")
    add(
        "--server-options", default="", help="more options of vLLM's server, as one argument, for all servers"
    )
    add("--bar", type=float, help="least throughput of each method over stock's, at the last point")
    add("--bar-token", type=float, help="most time of a token of each method over stock's, at the last point")
    add("--remark", default="", help="stored with the figures, for example the other load of the machine")


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print the tables and the bars.

    Returns:
        0; 1 if a bar fails or a server does not reduce as configured.

    Raises:
        ValueError: an option is not allowed.
        RuntimeError: a server failed.
        openai.APIError: the server at `--url` does not answer.
    """
    # Not at the top: they need packages of the extra `bench`, or seconds.
    from ficoco_vllm.benchmarks.harness import terminal
    from ficoco_vllm.benchmarks.harness.report import save
    from ficoco_vllm.benchmarks.load.checks import check
    from ficoco_vllm.benchmarks.load.report import page
    from ficoco_vllm.benchmarks.load.settings import make_turns
    from ficoco_vllm.benchmarks.load.summary import as_csv, summarise

    servers, points = _read(args)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of the client's own import of vLLM
    rows = _measure(args, make_turns(servers, points, args.rounds, args.seed))
    patches = _STOCK_VISUAL_TOKENS if args.model in (DEMO, WIDE) else None  # of other models unknown
    warnings = [] if args.url is not None else check(rows, servers, patches)
    result = {
        "model": _model_name(args),
        "environment": environment(),
        "command": _command(args),
        "remark": args.remark,
        "seed": args.seed,
        "num_rounds": args.rounds,
        "servers": [server.model_dump() for server in servers],
        "warnings": warnings,
        "summary": summarise(rows),
        "rows": rows,
    }
    report = page(result)
    written = save(report, result, as_csv(rows), args.out, "load")
    terminal.show(report.tables, [written], warnings)
    return terminal.report(_bars(args, servers, points, rows, warnings))


def _read(args: argparse.Namespace) -> "tuple[list[Server], list[Traffic]]":
    from ficoco_vllm.benchmarks.load.settings import Server, make_points

    servers = [Server.parse(text) for text in args.servers]
    if len({server.name for server in servers}) < len(servers):
        raise ValueError(f"--servers = {args.servers} names one twice")
    if args.url is not None and len(servers) != 1:
        servers = [Server(name="remote")]
    if args.rounds < 1:
        raise ValueError(f"--rounds = {args.rounds} is not allowed; allowed: an integer of at least 1")
    points = make_points(
        args.rates,
        args.concurrency,
        num_requests=args.requests,
        num_text_tokens=args.text_tokens,
        num_answer_tokens=args.answer_tokens,
        image_side=args.image_side,
    )
    if not points:
        raise ValueError("--rates and --concurrency are both empty; needed: one of either at least")
    return servers, points


def _measure(args: argparse.Namespace, turns: "list[Turn]") -> list[dict[str, Any]]:
    """The rows of all turns, from the server at `--url` or from servers that are started."""
    from ficoco_vllm.benchmarks.harness.http import served_model
    from ficoco_vllm.benchmarks.load.run import Target, run_turns

    if args.url is not None:
        name = args.served_model_name or served_model(args.url, args.api_key or "none")
        target = Target("", name, args.tokenizer, (), args.out, args.api_key, args.sample_seconds)
        return run_turns(turns, target, args.url)
    with tempfile.TemporaryDirectory() if args.model == WIDE else nullcontext("") as scratch:
        model, options = _model(args, Path(scratch))
        target = Target(
            model,
            args.served_model_name or "load",
            args.tokenizer or model,
            (*options, *args.server_options.split()),
            args.out,
            sample_seconds=args.sample_seconds,
        )
        return run_turns(turns, target)


def _model_name(args: argparse.Namespace) -> str:
    if args.url is not None:
        return f"served at {args.url}"
    return f"{args.model}, {args.layers} layers" if args.model == WIDE else str(args.model)


def _model(args: argparse.Namespace, scratch: Path) -> tuple[str, tuple[str, ...]]:
    """Folder of the model, and the options that it needs."""
    from ficoco_vllm.compat import multiplies_bfloat16
    from ficoco_vllm.reduction.cost import model_shape

    options: tuple[str, ...] = ()
    if args.model == DEMO:
        folder = Path(import_module("ficoco_vllm.demo_model").path())
    elif args.model == WIDE:
        from ficoco_vllm.benchmarks.harness import model

        model.write(scratch, args.layers)
        folder = scratch
        options = ("--load-format", "dummy")
    else:
        return args.model, ()
    decoder = model_shape(json.loads((folder / "config.json").read_text())).decoder
    dtype, value_bytes = ("bfloat16", 2) if multiplies_bfloat16() else ("float32", 4)
    block_bytes = _BLOCK * decoder.num_layers * 2 * decoder.num_kv_heads * decoder.head_dim * value_bytes
    num_blocks = _STOCK_REQUESTS * math.ceil(
        (_STOCK_VISUAL_TOKENS + args.text_tokens + args.answer_tokens) / _BLOCK
    )
    return str(folder), (
        *("--enforce-eager", "--dtype", dtype, "--max-model-len", "2048", "--block-size", str(_BLOCK)),
        *("--kv-cache-memory-bytes", str(num_blocks * block_bytes), *options),
    )


def _bars(
    args: argparse.Namespace,
    servers: "Sequence[Server]",
    points: "Sequence[Traffic]",
    rows: Sequence[Mapping[str, Any]],
    warnings: Sequence[str],
) -> list[Bar]:
    from ficoco_vllm.benchmarks.load.settings import STOCK
    from ficoco_vllm.benchmarks.load.summary import ratio

    if args.url is not None:
        return []
    last = points[-1].name
    methods = [server.name for server in servers if server.method is not None]
    bars = [at_most("load-servers-that-do-not-reduce-as-configured", len(warnings))]
    if args.bar is not None:
        for name in methods:
            throughput = ratio(rows, "request_throughput", name, STOCK, last)
            bars.append(Bar(f"load-throughput-{name}-over-stock", throughput, args.bar))
    if args.bar_token is not None:
        for name in methods:
            token = ratio(rows, "tpot_ms_p50", name, STOCK, last)
            bars.append(at_most(f"load-token-{name}-over-stock", token, args.bar_token))
    return bars


def _command(args: argparse.Namespace) -> str:
    shown = {
        "model": args.model if args.url is None else None,
        "url": args.url,
        "servers": " ".join(args.servers) if args.url is None else None,
        "rates": " ".join(args.rates),
        "concurrency": " ".join(map(str, args.concurrency)),
        "requests": args.requests,
        "text-tokens": args.text_tokens,
        "answer-tokens": args.answer_tokens,
        "rounds": args.rounds,
        "seed": args.seed,
        "server-options": args.server_options and repr(args.server_options),
    }
    words = " ".join(f"--{name} {value}" for name, value in shown.items() if value not in ("", None))
    return f"ficoco-vllm bench load {words}" + (f" --layers {args.layers}" if args.model == WIDE else "")
