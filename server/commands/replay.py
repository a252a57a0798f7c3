"""`ficoco-vllm replay`: what a target agreement would have done on a log of your own requests."""

import argparse
import json
from pathlib import Path
from typing import Any

from ficoco_vllm.server.commands.bench import add_questions, add_server, guarded, question_settings


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "replay",
        help="show what --ficoco-target-agreement would have done on a log of requests",
        description="Answers every question of a log at every budget of the ladder, once, and lets the control law "
        "of --ficoco-target-agreement run over these answers: the budget that each request would have got, how many "
        "answers would have been those of the full model, and what that would have cost.",
    )
    add_server(parser, "build/replay")
    add_questions(parser)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help='the log: JSONL of {"image": PATH, "prompt": TEXT}, with "class" for classes of traffic',
    )
    add("--prompt", help="prompt of images without one")
    add("--target-agreement", type=float, default=0.98, help="share of equal answers (default: %(default)s)")
    add("--method", default="ficoco-v", metavar="NAME", help="of the server (default: %(default)s)")
    add("--quality", default="{}", metavar="JSON", help="other settings of the target (docs/quality.md)")
    add("--repeat", type=int, default=1, help="times that the log is served (default: %(default)s)")
    add("--rate", type=float, default=10.0, help="requests per second of the log (default: %(default)s)")
    add("--max-tokens", type=int, default=16, help="limit of an answer (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Replay.

    Returns:
        0; 1 if a server fails; 2 for input that is not allowed.
    """
    return guarded(_replay, args)


def _replay(args: argparse.Namespace) -> int:
    from ficoco_vllm.benchmarks.calibration.data import read_items
    from ficoco_vllm.benchmarks.harness import terminal
    from ficoco_vllm.benchmarks.harness.results import write
    from ficoco_vllm.benchmarks.quality.replay import dry_run, lines, recorded, tables
    from ficoco_vllm.quality.settings import QualitySettings

    for name, value, least in (("--repeat", args.repeat, 1), ("--rate", args.rate, 1e-9)):
        if value < least:
            raise ValueError(f"{name} = {value} is not allowed; allowed: a number above 0")
    try:
        quality = json.loads(args.quality)
    except json.JSONDecodeError as error:
        raise ValueError(f"--quality = {args.quality!r} is not valid JSON ({error})") from error
    if not isinstance(quality, dict):
        raise ValueError(f"--quality = {args.quality!r} is not allowed; allowed: a JSON object")
    settings = QualitySettings.parse(
        {"seed": args.seed, **quality, "target_agreement": args.target_agreement}
    ).on_model(args.visual_tokens)
    fields = question_settings(args)
    del fields["seed"]
    items = read_items(args.data, args.prompt)
    requests = recorded(
        method=args.method, ladder=settings.ladder or (), items=items, max_tokens=args.max_tokens, **fields
    )
    report = dry_run(fields["host"], args.method, settings, requests * args.repeat, args.rate)
    path = args.out / "replay.json"
    write(report, path)
    terminal.show(tables(report), [*lines(report), f"written: {path}"], [])
    return 0
