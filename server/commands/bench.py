"""`ficoco-vllm bench`: accuracy, load, and the paper's benchmarks, through the endpoint."""

import argparse
import json
import os
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.load.arguments import add_arguments
from ficoco_vllm.server.commands.arguments import base_url, counts, fail, names

NEEDS = "pip install 'ficoco-vllm[bench]'"
Command = Callable[[argparse.Namespace], int]


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
    return guarded(args.command_function, args)


def guarded(command: Command, args: argparse.Namespace) -> int:
    """Run a command that measures, and report its errors in one line.

    Args:
        command: returns an exit status.
        args: its options.

    Returns:
        That status; 1 if a server fails; 2 for input that is not allowed or a package that is missing.
    """
    try:
        return command(args)
    except ModuleNotFoundError as error:
        return fail(f"{error}; {NEEDS}")
    except (ValueError, OSError) as error:
        return fail(str(error))
    except Exception as error:
        if getattr(error, "status_code", None) == HTTPStatus.UNAUTHORIZED:
            return fail("the server requires its API key: --api-key, or VLLM_API_KEY in the environment", 1)
        if isinstance(error, RuntimeError) or type(error).__module__.partition(".")[0] == "openai":
            return fail(str(error), 1)
        raise


def add_server(parser: argparse.ArgumentParser, out: str, *, api_key: str = "none") -> None:
    """Add the options that every benchmark of a server has.

    Args:
        parser: takes them.
        out: default folder of the results.
        api_key: default of `--api-key` without VLLM_API_KEY in the environment.
    """
    add = parser.add_argument
    add("--url", type=base_url, help="a running server (default: servers are started)")
    _add_api_key(parser, api_key)
    add("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")
    add(
        "--out",
        type=_folder,
        default=Path(out),
        metavar="DIR",
        help="folder for the report (HTML), JSON, CSV, LaTeX tables and plots (default: %(default)s)",
    )


def _add_api_key(parser: argparse.ArgumentParser, default: str) -> None:
    key = os.environ.get("VLLM_API_KEY", default)
    parser.add_argument(
        "--api-key", default=key, metavar="KEY", help="API key of the server (default: $VLLM_API_KEY)"
    )


def add_questions(parser: argparse.ArgumentParser) -> None:
    """Add the options of benchmarks that ask questions and store the answers."""
    add = parser.add_argument
    add("--model", help="folder of the model to serve, with config.json (default: the demo model)")
    add(
        "--visual-tokens",
        type=int,
        default=576,
        help="visual tokens of an unreduced image (default: %(default)s)",
    )
    add("--concurrency", type=int, default=16, help="concurrent questions (default: %(default)s)")
    add(
        "--answers",
        type=Path,
        help="JSONL of all answers, to continue from (default: answers.jsonl in --out)",
    )


def question_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Fields that the settings of these benchmarks share, from `add_server` and `add_questions`."""
    from ficoco_vllm.benchmarks.accuracy.client import Host

    host = Host(url=args.url, model=args.model, api_key=args.api_key, num_tokens=args.visual_tokens)
    answers = args.answers or args.out / "answers.jsonl"
    return {"host": host, "answers": answers, "seed": args.seed, "concurrency": args.concurrency}


def _folder(text: str) -> Path:
    path = Path(text)
    if path.suffix in (".json", ".html") or path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: a folder for the results")
    return path


def _add_accuracy(benchmarks: Any) -> None:
    parser = benchmarks.add_parser(
        "accuracy",
        help="every method at every budget, ablations and sensitivity, through the HTTP endpoint",
        description="Sends the embedded benchmark (easy-VQA's test split and rendered signs) to a running server, or "
        "to servers that it starts, one for each site. An interrupted run continues from --answers.",
    )
    parser.set_defaults(command_function=_accuracy)
    add_server(parser, "build/accuracy")
    add_questions(parser)
    add = parser.add_argument
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
    add("--reference", type=Path, help="JSON of an earlier run; warn where this one is worse")


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
    _add_api_key(parser, "none")
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
        description="Starts the servers one after the other and sends each the same traffic with vLLM's own benchmark "
        "client. With --url it measures a server that is up; --servers then has one name for it.",
    )
    parser.set_defaults(command_function=_load)
    add_server(parser, "build/load", api_key=os.environ.get("OPENAI_API_KEY", ""))
    add_arguments(parser)


def _accuracy(args: argparse.Namespace) -> int:
    from ficoco_vllm.benchmarks.accuracy.regression import regressions
    from ficoco_vllm.benchmarks.accuracy.report import as_csv, bars, page, summary
    from ficoco_vllm.benchmarks.accuracy.run import measure
    from ficoco_vllm.benchmarks.accuracy.suites import TABLES, methods_of
    from ficoco_vllm.benchmarks.accuracy.variants import SITES
    from ficoco_vllm.benchmarks.accuracy.workload import KINDS
    from ficoco_vllm.benchmarks.harness import terminal
    from ficoco_vllm.benchmarks.harness.report import save
    from ficoco_vllm.benchmarks.harness.results import report

    reference = args.reference and json.loads(args.reference.read_text(encoding="utf-8"))
    result = measure(
        methods=args.methods or methods_of(args.sites or SITES),
        keeps=args.keeps,
        tables=args.tables or TABLES,
        kinds=args.kinds or KINDS,
        count=args.count,
        **question_settings(args),
    )
    regressed = regressions(result, reference) if reference else []
    limits = bars(result, regressed if reference else None)
    result["warnings"] += regressed
    written = save(page(result), result, as_csv(result), args.out, "accuracy")
    terminal.show(summary(result), [written], result["warnings"])
    return report(limits)


def _load(args: argparse.Namespace) -> int:
    from ficoco_vllm.benchmarks.load.command import run

    return run(args)


def _lmms(args: argparse.Namespace) -> int:
    """Run one benchmark of lmms-eval, or print the table of all results."""
    from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS
    from ficoco_vllm.benchmarks.lmms.command import PYTHON, evaluate, read_results, table

    if args.name is None:
        print("\n".join(table(read_results(args.out))))
        return 0
    if args.name not in BENCHMARKS:
        return fail(f"BENCHMARK = {args.name!r} is not allowed; allowed: {', '.join(BENCHMARKS)}")
    result = evaluate(
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
    args.out.mkdir(parents=True, exist_ok=True)
    name = f"{args.name}-{args.method or 'full'}-{args.keep or 'all'}.json"
    (args.out / name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table([result])))
    return 0
