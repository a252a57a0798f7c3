"""`ficoco-vllm calibrate`: the smallest budget that agrees with the full model on one's own traffic."""

import argparse
import json
from pathlib import Path
from typing import Any

from ficoco_vllm.server.commands.bench import NEEDS
from ficoco_vllm.server.commands.errors import fail
from ficoco_vllm.server.commands.numbers import numbers
from ficoco_vllm.server.commands.plan import DEMO, read_config

DEFAULT_OUT = Path("build/calibration.html")


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find the smallest budget that still answers your own questions as the full model does",
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
    add("--prompt", help="for images that have none of their own")
    add("--target-agreement", type=float, default=0.98, help="share of equal answers (default: %(default)s)")
    add("--confidence", type=float, default=0.95, help="that the share is reached (default: %(default)s)")
    add("--methods", default="ficoco-v", metavar="A,B", help="default: %(default)s")
    add("--budgets", type=numbers, metavar="N,N", help="visual tokens (default: 288,192,144,96,64,48,32,16)")
    add("--model", help="folder of the model to serve, with config.json (default: the demo model)")
    add("--url", help="a running server instead, without a path; --model still says what it serves")
    add("--api-key", default="none", help="of the server")
    add("--visual-tokens", type=int, default=576, help="of an image without reduction (default: %(default)s)")
    add("--max-tokens", type=int, default=16, help="of an answer (default: %(default)s)")
    add("--concurrency", type=int, default=16, help="questions under way at once (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the order of the questions")
    add("--answers", type=Path, help="JSONL of all answers, to go on from (default: beside --out)")
    add("--out", type=Path, default=DEFAULT_OUT, help="the report (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Calibrate.

    Returns:
        0; 1 if no method has a safe budget, the server fails or does not reduce as asked; 2 for input that is not
        allowed.
    """
    try:
        from openai import APIError

        from ficoco_vllm.benchmarks.accuracy.host import Host
        from ficoco_vllm.benchmarks.calibration.data import read_items, shuffled
        from ficoco_vllm.benchmarks.calibration.report import lines, page
        from ficoco_vllm.benchmarks.calibration.run import BUDGETS, Settings, calibrate

        answers = args.answers or args.out.with_suffix(".jsonl")
        host = Host(
            url=args.url and args.url.rstrip("/").removesuffix("/v1"),
            model=args.model,
            api_key=args.api_key,
            num_tokens=args.visual_tokens,
        )
        settings = Settings(
            methods=tuple(name.strip() for name in args.methods.split(",") if name.strip()),
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
