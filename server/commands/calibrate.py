"""`ficoco-vllm calibrate`: the smallest budget that agrees with the full model on your own traffic."""

import argparse
from pathlib import Path
from typing import Any

from ficoco_vllm.server.commands.arguments import counts, names
from ficoco_vllm.server.commands.bench import add_questions, add_server, guarded, question_settings
from ficoco_vllm.server.commands.plan import DEMO, read_config


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "calibrate",
        help="find the smallest budget that answers your own questions as the full model does",
        description="Replays images and prompts against the full model and reduced ones; no labels are needed. Prints "
        "the smallest safe setting of each method. With --url, --model still describes the server's model.",
    )
    add_server(parser, "build/calibration")
    add_questions(parser)
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
    add("--max-tokens", type=int, default=16, help="limit of an answer (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Calibrate.

    Returns:
        0; 1 if no method has a safe budget, the server fails or does not reduce as requested; 2 for input that is
        not allowed.
    """
    return guarded(_calibrate, args)


def _calibrate(args: argparse.Namespace) -> int:
    from ficoco_vllm.benchmarks.calibration.data import read_items, shuffled
    from ficoco_vllm.benchmarks.calibration.report import as_csv, lines, overview, page
    from ficoco_vllm.benchmarks.calibration.run import BUDGETS, Settings, calibrate
    from ficoco_vllm.benchmarks.harness import terminal
    from ficoco_vllm.benchmarks.harness.report import save

    settings = Settings(
        methods=args.methods,
        target=args.target_agreement,
        config=read_config(args.model or DEMO),
        budgets=args.budgets or BUDGETS,
        confidence=args.confidence,
        max_tokens=args.max_tokens,
        **question_settings(args),
    )
    items = shuffled(read_items(args.data, args.prompt), args.seed)
    report = calibrate(settings, items)
    written = save(page(report, items), report, as_csv(report), args.out, "calibration")
    entries = report["methods"]
    warnings = [line for entry in entries for line in entry["warnings"]]
    terminal.show([overview(report)], [*lines(report), written], warnings)
    return int(all(entry["safe"] is None for entry in entries) or bool(warnings))
