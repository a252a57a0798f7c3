"""`ficoco-vllm bench load` and `make bench-load`: the command."""

import argparse
import json
import math
import os
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness import model, terminal
from ficoco_vllm.benchmarks.harness.http import check_answers, served_model
from ficoco_vllm.benchmarks.harness.report import save
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment
from ficoco_vllm.benchmarks.harness.results import report as print_bars
from ficoco_vllm.benchmarks.load.arguments import DEMO, WIDE
from ficoco_vllm.benchmarks.load.report import page
from ficoco_vllm.benchmarks.load.run import run_turns
from ficoco_vllm.benchmarks.load.settings import STOCK, Server, Target, Traffic, Turn, make_turns
from ficoco_vllm.benchmarks.load.summary import Rows, as_csv, check, ratio, summarise
from ficoco_vllm.compat import multiplies_bfloat16
from ficoco_vllm.reduction.cost import model_shape

# For the demo model and `WIDE`: the cache holds a dozen of stock vLLM's requests, so that requests compete for it.
_STOCK_REQUESTS = 12
_BLOCK = 32
_SHOWN = (
    "rates",
    "concurrency",
    "requests",
    "text_tokens",
    "answer_tokens",
    "rounds",
    "seed",
    "server_options",
)


def run(args: argparse.Namespace) -> int:
    """Measure, write the report, print the tables and the bars; returns 1 if a bar fails.

    Raises:
        ValueError: an option is not allowed.
        RuntimeError: a server failed, or nothing answers at `--url`.
        openai.APIError: the server at `--url` refuses.
    """
    servers, points = _read(args)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # of the client's own import of vLLM
    rows = _measure(args, make_turns(servers, points, args.rounds, args.seed))
    patches = model.PATCHES if args.model in (DEMO, WIDE) else None  # of other models unknown
    warnings = [] if args.url is not None else check(rows, servers, patches)
    result = {
        "model": _model_name(args),
        "environment": environment(),
        "command": _command(args),
        "remark": args.remark,
        "seed": args.seed,
        "num_rounds": args.rounds,
        "servers": [asdict(server) for server in servers],
        "warnings": warnings,
        "summary": summarise(rows),
        "rows": rows,
    }
    report = page(result)
    written = save(report, result, as_csv(rows), args.out, "load")
    terminal.show(report.tables, [written], warnings)
    return print_bars(() if args.url is not None else _bars(args, servers, points[-1].name, rows, warnings))


def _read(args: argparse.Namespace) -> tuple[list[Server], list[Traffic]]:
    servers = [Server.parse(text) for text in args.servers]
    if len({server.name for server in servers}) < len(servers):
        raise ValueError(f"--servers = {args.servers} names one twice")
    if args.url is not None and len(servers) != 1:
        servers = [Server(name="remote")]
    if args.rounds < 1:
        raise ValueError(f"--rounds = {args.rounds} is not allowed; allowed: an integer of at least 1")
    point = partial(
        Traffic,
        num_requests=args.requests,
        num_text_tokens=args.text_tokens,
        num_answer_tokens=args.answer_tokens,
        image_side=args.image_side,
    )
    points = [point(rate=rate) for rate in args.rates]
    points += [point(concurrency=number) for number in args.concurrency]
    if not points:
        raise ValueError("--rates and --concurrency are both empty; needed: one of either at least")
    return servers, points


def _measure(args: argparse.Namespace, turns: list[Turn]) -> list[dict[str, Any]]:
    """The rows of all turns, from the server at `--url` or from servers that are started."""
    if args.url is not None:
        check_answers(args.url)
        name = args.served_model_name or served_model(args.url, args.api_key or "none")
        target = Target("", name, args.tokenizer, (), args.out, args.api_key, args.sample_seconds)
        return run_turns(turns, target, args.url)
    with tempfile.TemporaryDirectory() if args.model == WIDE else nullcontext("") as scratch:
        served, options = _model(args, Path(scratch))
        options += tuple(args.server_options.split())
        name, tokenizer = args.served_model_name or "load", args.tokenizer or served
        target = Target(served, name, tokenizer, options, args.out, sample_seconds=args.sample_seconds)
        return run_turns(turns, target)


def _model_name(args: argparse.Namespace) -> str:
    if args.url is not None:
        return f"served at {args.url}"
    return f"{args.model}, {args.layers} layers" if args.model == WIDE else str(args.model)


def _model(args: argparse.Namespace, scratch: Path) -> tuple[str, tuple[str, ...]]:
    """Folder of the model, and the options that it needs."""
    options: tuple[str, ...] = ()
    if args.model == DEMO:
        folder = Path(demo_model.path())
    elif args.model == WIDE:
        folder, options = model.write(scratch, args.layers), ("--load-format", "dummy")
    else:
        return args.model, ()
    decoder = model_shape(json.loads((folder / "config.json").read_text())).decoder
    dtype, value_bytes = ("bfloat16", 2) if multiplies_bfloat16() else ("float32", 4)
    block_bytes = _BLOCK * decoder.num_layers * 2 * decoder.num_kv_heads * decoder.head_dim * value_bytes
    num_tokens = model.PATCHES + args.text_tokens + args.answer_tokens
    num_blocks = _STOCK_REQUESTS * math.ceil(num_tokens / _BLOCK)
    return str(folder), (
        *("--enforce-eager", "--dtype", dtype, "--max-model-len", "2048", "--block-size", str(_BLOCK)),
        *("--kv-cache-memory-bytes", str(num_blocks * block_bytes), *options),
    )


def _bars(
    args: argparse.Namespace, servers: Sequence[Server], last: str, rows: Rows, warnings: Sequence[str]
) -> Iterator[Bar]:
    yield at_most("load-servers-that-do-not-reduce-as-configured", len(warnings))
    for name in (server.name for server in servers if server.method is not None):
        if args.bar is not None:
            throughput = ratio(rows, "request_throughput", name, STOCK, last)
            yield Bar(f"load-throughput-{name}-over-stock", throughput, args.bar)
        if args.bar_token is not None:
            token = ratio(rows, "tpot_ms_p50", name, STOCK, last)
            yield at_most(f"load-token-{name}-over-stock", token, args.bar_token)


def _command(args: argparse.Namespace) -> str:
    """The command for the report, without the API key."""
    names = ("model", "servers") if args.url is None else ("url",)
    words = ["ficoco-vllm", "bench", "load"]
    for name in (*names, *_SHOWN, *["layers"] * (args.model == WIDE)):
        value = getattr(args, name)
        values = [str(one) for one in (value if isinstance(value, list) else [value]) if one != ""]
        words += [f"--{name.replace('_', '-')}", *values] if values else []
    return shlex.join(words)
