"""`ficoco-vllm bench`: accuracy, load, and the paper's benchmarks, through the endpoint."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.load import command as load
from ficoco_vllm.server.commands.arguments import base_url, counts, fail, names

NEEDS = "pip install 'ficoco-vllm[bench]'"


def add_parser(subparsers: Any) -> None:
    """Add the command and its benchmarks."""
    parser = subparsers.add_parser("bench", help="measure accuracy and load through the endpoint")
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    _add_accuracy(benchmarks)
    _add_lmms(benchmarks)
    _add_load(benchmarks)


def run(args: argparse.Namespace) -> int:
    """Run a benchmark.

    Returns:
        0; 1 if a server fails or does not apply the requested method; 2 for input that is not allowed.
    """
    command: Callable[[argparse.Namespace], int] = args.command_function
    return command(args)


def _add_accuracy(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "accuracy",
        help="every method at every budget, ablations and sensitivity, through the HTTP endpoint",
        description="Sends the embedded benchmark (easy-VQA's test split and rendered signs) to a running server, or "
        "to servers that it starts. An interrupted run continues from --answers.",
    )
    parser.set_defaults(command_function=_accuracy)
    add = parser.add_argument
    add("--url", type=base_url, help="a running server (default: servers are started, one for each site)")
    add("--api-key", default="none", help="API key of the server")
    add("--model", help="folder of the model to serve (default: the demo model)")
    add(
        "--sites",
        type=names,
        metavar="A,B",
        help="only methods that reduce there: tower, decoder, both (default: all)",
    )
    add("--methods", type=names, metavar="A,B", help="default: every method that a LLaVA can serve")
    add(
        "--keeps",
        type=counts,
        default=(288, 192, 128, 64),
        metavar="N,N",
        help="budgets (default: 288,192,128,64)",
    )
    add("--tables", type=names, metavar="A,B", help="methods, ablation-v, ablation-l, ... (default: all)")
    add("--kinds", type=names, metavar="A,B", help="types of question (default: all but colour_by_number)")
    add("--count", type=int, default=100, help="questions of each type (default: %(default)s)")
    add("--few-count", type=int, default=100, help="the same for all but the method comparison")
    add(
        "--visual-tokens",
        type=int,
        default=576,
        help="visual tokens of an unreduced image (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of the questions")
    add("--concurrency", type=int, default=16, help="concurrent questions (default: %(default)s)")
    add("--reference", type=Path, help="JSON of an earlier run; warn where this one is worse")
    add(
        "--answers",
        type=Path,
        default=Path("build/accuracy.jsonl"),
        help="JSONL of all answers (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path("build/accuracy.json"),
        help="JSON of the figures (default: %(default)s)",
    )


def _add_lmms(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "lmms",
        help="one of the paper's ten benchmarks through lmms-eval, compared with the paper's figure",
        description="Starts a server (or uses --url) and runs lmms-eval against it, in a separate environment "
        "(`make lmms`). lmms-eval downloads the data sets. Without BENCHMARK: the table of all results in --out.",
    )
    parser.set_defaults(command_function=_lmms)
    add = parser.add_argument
    add(
        "name",
        metavar="BENCHMARK",
        nargs="?",
        help="sqa, textvqa, pope, vizwiz, mm-vet, mmbench-cn, gqa, ...",
    )
    add("--model", help="checkpoint to serve, for example llava-hf/llava-1.5-7b-hf")
    add("--method", help="reduction method (default: all visual tokens)")
    add("--keep", type=int, help="visual tokens kept")
    add("--url", type=base_url, help="a running server; --model, --method and --keep still describe it")
    add("--api-key", default="none", help="API key of the server")
    add("--limit", type=int, help="number of questions (default: all)")
    add("--concurrency", type=int, default=16, help="concurrent questions (default: %(default)s)")
    add(
        "--lmms-python",
        type=Path,
        help="Python of the lmms-eval environment (default: .venv-lmms/bin/python)",
    )
    add("--out", type=Path, default=Path("build/lmms"), help="folder of results (default: %(default)s)")


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
    except ValueError as error:
        return fail(str(error))
    except RuntimeError as error:
        return fail(str(error), 1)


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
            tables=args.tables or TABLES,
            kinds=args.kinds or KINDS,
            keeps=args.keeps,
            count=args.count,
            few_count=args.few_count,
            answers=args.answers,
            methods=args.methods or methods_of(args.sites or SITES),
            host=Host(
                url=args.url,
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


def _lmms(args: argparse.Namespace) -> int:
    """Run one benchmark of lmms-eval, or print the table of all results."""
    from openai import APIError

    from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS
    from ficoco_vllm.benchmarks.lmms.collect import read_results, table
    from ficoco_vllm.benchmarks.lmms.command import PYTHON, Run, evaluate

    if args.name is None:
        print("\n".join(table(read_results(args.out))))
        return 0
    if args.name not in BENCHMARKS:
        return fail(f"BENCHMARK = {args.name!r} is not allowed; allowed: {', '.join(BENCHMARKS)}")
    request = Run(
        args.name,
        BENCHMARKS[args.name],
        args.lmms_python or PYTHON,
        url=args.url,
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
        return fail(str(error))
    except (RuntimeError, APIError) as error:
        return fail(str(error), 1)
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.name}-{args.method or 'full'}-{args.keep or 'all'}.json"
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table([result])))
    return 0
