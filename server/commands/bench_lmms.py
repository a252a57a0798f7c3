"""`ficoco-vllm bench lmms`: one of the paper's benchmarks through lmms-eval, and the table of all runs."""

import argparse
import json
from pathlib import Path
from typing import Any

from ficoco_vllm.server.commands.errors import fail

OUT = Path("build/lmms")


def add_parser(benchmarks: Any) -> None:
    """Add the benchmark's options."""
    parser = benchmarks.add_parser(
        "lmms",
        help="one of the paper's ten benchmarks through lmms-eval, beside the paper's figure",
        description="Starts a server (or takes --url) and lets lmms-eval, in an environment of its own (`make lmms`), "
        "ask it. Data sets are downloaded by lmms-eval. Without BENCHMARK: the table of all results in --out.",
    )
    parser.set_defaults(command_function=run)
    add = parser.add_argument
    add(
        "name",
        metavar="BENCHMARK",
        nargs="?",
        help="sqa, textvqa, pope, vizwiz, mm-vet, mmbench-cn, gqa, ...",
    )
    add("--model", help="checkpoint to serve, for example llava-hf/llava-1.5-7b-hf")
    add("--method", help="reduction method (default: all visual tokens)")
    add("--keep", type=int, help="visual tokens that are left")
    add(
        "--url",
        help="a running server, without a path; --model, --method and --keep still say what it serves",
    )
    add("--api-key", default="none", help="of the server")
    add("--limit", type=int, help="only so many questions")
    add("--concurrency", type=int, default=16, help="questions under way at once (default: %(default)s)")
    add("--lmms-python", type=Path, help="of the environment with lmms-eval (default: .venv-lmms/bin/python)")
    add("--out", type=Path, default=OUT, help="folder of results (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Run one benchmark, or print the table of those that were run.

    Returns:
        0; 1 if the server or lmms-eval failed; 2 for input that is not allowed.
    """
    from openai import APIError

    from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS
    from ficoco_vllm.benchmarks.lmms.collect import read_results, table
    from ficoco_vllm.benchmarks.lmms.command import PYTHON, Run, evaluate

    if args.name is None:
        print("\n".join(table(read_results(args.out))))
        return 0
    if args.name not in BENCHMARKS:
        return fail(f"BENCHMARK = {args.name!r} is not allowed; allowed: {', '.join(BENCHMARKS)}", 2)
    request = Run(
        args.name,
        BENCHMARKS[args.name],
        args.lmms_python or PYTHON,
        url=args.url and args.url.rstrip("/").removesuffix("/v1"),
        model=args.model,
        method=args.method,
        keep=args.keep,
        api_key=args.api_key,
        concurrency=args.concurrency,
        limit=args.limit,
    )
    try:
        result = evaluate(request)
    except ValueError as error:
        return fail(str(error), 2)
    except (RuntimeError, APIError) as error:
        return fail(str(error), 1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.name}-{args.method or 'full'}-{args.keep or 'all'}.json"
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table([result])))
    return 0
