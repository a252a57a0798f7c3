"""`ficoco-vllm bench`: figures that others can repeat."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.load import command as load
from ficoco_vllm.server.commands import bench_lmms
from ficoco_vllm.server.commands.errors import fail
from ficoco_vllm.server.commands.numbers import numbers

NEEDS = "pip install 'ficoco-vllm[bench]'"
DEFAULT_ANSWERS = Path("build/accuracy.jsonl")
DEFAULT_OUT = Path("build/accuracy.json")


def add_parser(subparsers: Any) -> None:
    """Add the command and its benchmarks."""
    parser = subparsers.add_parser("bench", help="measure accuracy and load through the endpoint")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    _add_accuracy(benchmarks)
    bench_lmms.add_parser(benchmarks)
    _add_load(benchmarks)


def run(args: argparse.Namespace) -> int:
    """Run a benchmark.

    Returns:
        0; 1 if a server fails or does not do what it was asked; 2 for input that is not allowed.
    """
    command: Callable[[argparse.Namespace], int] = args.command_function
    return command(args)


def _add_accuracy(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "accuracy",
        help="every method by every budget, ablations and sensitivity, through the HTTP endpoint",
        description="Asks a server, or servers that it starts, the embedded benchmark: easy-VQA's test split and "
        "rendered signs. A run that is cut off goes on from --answers.",
    )
    parser.set_defaults(command_function=_accuracy)
    add = parser.add_argument
    add("--url", help="a running server, without a path (default: servers are started, one for each site)")
    add("--api-key", default="none", help="of the server")
    add("--model", help="folder of the model to serve (default: the demo model)")
    add("--sites", metavar="A,B", help="only methods that reduce there: tower, decoder, both (default: all)")
    add("--methods", metavar="A,B", help="default: every method that a LLaVA can serve")
    add(
        "--keeps",
        type=numbers,
        default=(288, 192, 128, 64),
        metavar="N,N",
        help="budgets (default: 288,192,128,64)",
    )
    add("--tables", metavar="A,B", help="methods, ablation-v, ablation-l, ... (default: all)")
    add("--kinds", metavar="A,B", help="types of question (default: all but colour_by_number)")
    add("--count", type=int, default=100, help="questions of each type (default: %(default)s)")
    add("--few-count", type=int, default=100, help="the same for all but the method comparison")
    add("--visual-tokens", type=int, default=576, help="of an image without reduction (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the questions")
    add("--concurrency", type=int, default=16, help="questions under way at once (default: %(default)s)")
    add("--reference", type=Path, help="JSON of an earlier run; warn where this one is worse")
    add("--answers", type=Path, default=DEFAULT_ANSWERS, help="JSONL of all answers (default: %(default)s)")
    add("--out", type=Path, default=DEFAULT_OUT, help="JSON of the figures (default: %(default)s)")


def _add_load(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "load",
        help="stock vLLM and reducing servers under the same load, in turns",
        description="Starts the servers one after the other, sends each the same traffic with vLLM's own benchmark "
        "client, and writes JSON, CSV and an HTML report.",
    )
    parser.set_defaults(command_function=_load)
    load.add_arguments(parser)


def _load(args: argparse.Namespace) -> int:
    try:
        return load.run(args)
    except ModuleNotFoundError as error:
        return fail(f"{error}; {NEEDS}")


def _accuracy(args: argparse.Namespace) -> int:
    try:
        from openai import APIError

        from ficoco_vllm.benchmarks.accuracy.host import Host
        from ficoco_vllm.benchmarks.accuracy.regression import regressions
        from ficoco_vllm.benchmarks.accuracy.run import Options, measure
        from ficoco_vllm.benchmarks.accuracy.suites import TABLES, methods_of
        from ficoco_vllm.benchmarks.accuracy.tables import methods_table
        from ficoco_vllm.benchmarks.accuracy.variants import SITES
        from ficoco_vllm.benchmarks.accuracy.workload import KINDS
        from ficoco_vllm.benchmarks.harness.results import write

        options = Options(
            tables=_names(args.tables) or TABLES,
            kinds=_names(args.kinds) or KINDS,
            keeps=args.keeps,
            count=args.count,
            few_count=args.few_count,
            answers=args.answers,
            methods=_names(args.methods) or methods_of(_names(args.sites) or SITES),
            host=Host(
                url=args.url and args.url.rstrip("/").removesuffix("/v1"),
                model=args.model,
                api_key=args.api_key,
                num_tokens=args.visual_tokens,
            ),
            seed=args.seed,
            concurrency=args.concurrency,
        )
        result = measure(options)
        if args.reference is not None:
            result["warnings"] += regressions(result, json.loads(args.reference.read_text(encoding="utf-8")))
    except ModuleNotFoundError as error:
        return fail(f"{error}; {NEEDS}")
    except (ValueError, OSError) as error:
        return fail(str(error))
    except (RuntimeError, APIError) as error:
        return fail(str(error), 1)
    write(result, args.out)
    if any(row["table"] == "methods" for row in result["rows"]):
        print("\n".join(methods_table(result)))
    for warning in result["warnings"]:
        print(f"WARNING {warning}", file=sys.stderr)
    return int(bool(result["warnings"]))


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
