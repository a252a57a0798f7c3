"""`ficoco-vllm calibrate`: the smallest budget that agrees with the full model on your own traffic."""

import argparse
import json
from pathlib import Path
from typing import Any

from ficoco_vllm.server.commands.arguments import base_url, counts, fail, names
from ficoco_vllm.server.commands.bench import NEEDS
from ficoco_vllm.server.commands.plan import DEMO, read_config


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find the smallest budget that answers your own questions as the full model does",
        description="Replays images and prompts against the full model and reduced ones; no labels are needed. Prints "
        "the smallest safe setting of each method and writes a report as HTML, and as JSON beside it.",
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help='JSONL of {"image": PATH, "prompt": TEXT}, or a folder of images',
    )
    add("--prompt", help="prompt of images without one")
    add("--target-agreement", type=float, default=0.98, help="share of equal answers (default: %(default)s)")
    add(
        "--confidence",
        type=float,
        default=0.95,
        help="confidence that the share is reached (default: %(default)s)",
    )
    add("--methods", type=names, default="ficoco-v", metavar="A,B", help="default: %(default)s")
    add("--budgets", type=counts, metavar="N,N", help="visual tokens (default: 288,192,144,96,64,48,32,16)")
    add("--model", help="folder of the model to serve, with config.json (default: the demo model)")
    add("--url", type=base_url, help="a running server instead; --model still describes it")
    add("--api-key", default="none", help="API key of the server")
    add(
        "--visual-tokens",
        type=int,
        default=576,
        help="visual tokens of an unreduced image (default: %(default)s)",
    )
    add("--max-tokens", type=int, default=16, help="limit of an answer (default: %(default)s)")
    add("--concurrency", type=int, default=16, help="concurrent questions (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the order of the questions")
    add("--answers", type=Path, help="JSONL of all answers, to continue from (default: next to --out)")
    add("--out", type=Path, default=Path("build/calibration.html"), help="the report (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Calibrate.

    Returns:
        0; 1 if no method has a safe budget, the server fails or does not reduce as requested; 2 for input that is
        not allowed.
    """
    try:
        from openai import APIError

        from ficoco_vllm.benchmarks.accuracy.host import Host
        from ficoco_vllm.benchmarks.calibration.data import read_items, shuffled
        from ficoco_vllm.benchmarks.calibration.report import lines, page
        from ficoco_vllm.benchmarks.calibration.run import BUDGETS, Settings, calibrate

        answers = args.answers or args.out.with_suffix(".jsonl")
        host = Host(
            url=args.url,
            model=args.model,
            api_key=args.api_key,
            num_tokens=args.visual_tokens,
        )
        settings = Settings(
            methods=args.methods,
            target=args.target_agreement,
            config=read_config(args.model or DEMO),
            answers=answers,
            host=host,
            budgets=args.budgets or BUDGETS,
            confidence=args.confidence,
            max_tokens=args.max_tokens,
            seed=args.seed,
            concurrency=args.concurrency,
        )
        items = shuffled(read_items(args.data, args.prompt), args.seed)
        report = calibrate(settings, items)
    except ModuleNotFoundError as error:
        return fail(f"{error}; {NEEDS}")
    except (ValueError, OSError) as error:
        return fail(str(error))
    except (RuntimeError, APIError) as error:
        return fail(str(error), 1)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(page(report, items), encoding="utf-8")
    args.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print("\n".join([*lines(report), "", f"report: {args.out}"]))
    entries = report["methods"]
    return int(all(entry["safe"] is None for entry in entries) or any(entry["warnings"] for entry in entries))
