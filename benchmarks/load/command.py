"""`ficoco-vllm bench load` and `make bench-load`: the command."""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, report, write
from ficoco_vllm.benchmarks.load.checks import check
from ficoco_vllm.benchmarks.load.run import Target, run_turn, run_turns
from ficoco_vllm.benchmarks.load.settings import STOCK, Server, Traffic, Turn, make_points, make_turns
from ficoco_vllm.benchmarks.load.summary import as_csv, as_table, ratio, summarise
from ficoco_vllm.compat import multiplies_bfloat16
from ficoco_vllm.reduction.cost import model_shape

DEMO = "demo"
WIDE = "llava-1.5-7b-width"
# For the demo model and `WIDE`: the cache holds a dozen of stock vLLM's requests, so that requests compete for it.
_STOCK_REQUESTS = 12
_STOCK_VISUAL_TOKENS = 576
_BLOCK = 32
_DEFAULT_SERVERS = (STOCK, "ficoco-v:64", "ficoco-v:192")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add(
        "--model",
        default=DEMO,
        help=f"a folder or name that vLLM serves; {DEMO!r}: the demo model; {WIDE!r}: LLaVA-1.5-7B's shapes with "
        "--layers decoder layers and random weights (default: %(default)s)",
    )
    add("--layers", type=int, default=2, help=f"decoder layers of {WIDE!r} (default: %(default)s)")
    add(
        "--url",
        help="measure a server that is up, instead of starting any; --servers then has one name for it",
    )
    add("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="of the server at --url")
    add("--served-model-name", default="load", help="name of the model in requests (default: %(default)s)")
    add("--tokenizer", help="folder or name, for prompts of a known length (default: the model)")
    add("--servers", nargs="+", default=list(_DEFAULT_SERVERS), help="stock, METHOD or METHOD:KEEP, each")
    add("--rates", nargs="*", default=[], help="requests a second, one point each")
    add("--concurrency", nargs="*", type=int, default=[4, 16], help="concurrent requests, one point each")
    add("--requests", type=int, default=64, help="of a point (default: %(default)s)")
    add("--text-tokens", type=int, default=60, help="of a prompt, beside its image (default: %(default)s)")
    add("--answer-tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    add("--image-side", type=int, default=336, help="pixels (default: %(default)s)")
    add("--rounds", type=int, default=2, help="turns of each server (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--sample-seconds", type=float, default=0.5, help="between two reads of /metrics")
    add(
        "--server-options", default="", help="more options of vLLM's server, as one argument, for all servers"
    )
    add("--bar", type=float, help="least throughput of each method over stock's, at the last point")
    add("--bar-token", type=float, help="most time of a token of each method over stock's, at the last point")
    add("--remark", default="", help="stored with the figures, for example the other load of the machine")
    add("--out", type=Path, default=Path("build/load"), help="folder of the results (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Measure, write JSON, CSV and HTML, print the table and the bars.

    Returns:
        0; 1 if a bar fails or a server does not reduce as configured.

    Raises:
        ValueError: an option is not allowed.
        RuntimeError: a server failed.
    """
    servers, points = _read(args)
    from ficoco_vllm.benchmarks.load.report import as_html  # needs packages of the extra `bench`

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of the client's own import of vLLM
    turns = make_turns(servers, points, args.rounds, args.seed)
    rows = _measure(args, turns)
    patches = _STOCK_VISUAL_TOKENS if args.model in (DEMO, WIDE) else None  # of other models unknown
    warnings = [] if args.url is not None else check(rows, servers, patches)
    result = {
        "model": f"{args.model}, {args.layers} layers" if args.model == WIDE else args.model,
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
    write(result, args.out / "load.json")
    (args.out / "load.csv").write_text(as_csv(rows))
    (args.out / "load.html").write_text(as_html(result))
    print(as_table(result["summary"]))
    print(f"\nwritten: {args.out}/load.json, load.csv, load.html")
    for line in warnings:
        _say(f"WARNING {line}")
    return report(_bars(args, servers, points, rows)) or int(bool(warnings))


def _read(args: argparse.Namespace) -> tuple[list[Server], list[Traffic]]:
    servers = [Server.parse(text) for text in args.servers]
    if len({server.name for server in servers}) < len(servers):
        raise ValueError(f"--servers = {args.servers} names one twice")
    if args.url is not None and len(servers) != 1:
        servers = [Server(name="remote")]
    if args.rounds < 1:
        raise ValueError(f"--rounds = {args.rounds} is not allowed; allowed: an integer of at least 1")
    if args.url is not None and args.model == DEMO and args.tokenizer is None:
        raise ValueError(
            "--tokenizer is needed with --url: a folder or name that holds the model's tokenizer"
        )
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


def _measure(args: argparse.Namespace, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """The rows of all turns, from the server at `--url` or from servers that are started."""
    if args.url is not None:
        target = Target("", args.served_model_name, args.tokenizer or args.model, (), args.out)
        headers = {"Authorization": f"Bearer {args.api_key}"} if args.api_key else {}
        return [
            row
            for turn in turns
            for row in run_turn(turn, args.url.rstrip("/"), target, headers, args.sample_seconds, _say)
        ]
    with tempfile.TemporaryDirectory() if args.model == WIDE else nullcontext("") as scratch:
        model, options = _model(args, Path(scratch))
        target = Target(
            model,
            args.served_model_name,
            args.tokenizer or model,
            (*options, *args.server_options.split()),
            args.out,
        )
        return run_turns(list(turns), target, args.sample_seconds, _say)


def _model(args: argparse.Namespace, scratch: Path) -> tuple[str, tuple[str, ...]]:
    """Folder of the model, and the options that it needs."""
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
    servers: Sequence[Server],
    points: Sequence[Traffic],
    rows: Sequence[Mapping[str, Any]],
) -> list[Bar]:
    if args.url is not None:
        return []
    last = points[-1].name
    methods = [server.name for server in servers if server.method is not None]
    bars = []
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
        "model": args.model,
        "servers": " ".join(args.servers),
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
