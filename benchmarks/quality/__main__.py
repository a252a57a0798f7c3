"""`make bench-quality`: a target agreement on traffic that turns from easy to hard and back.

Three parts, on the demo model:
1. Traffic: colours and shapes, then numbers, then colours and shapes again, none naming a budget. Each answer is
   compared with the full model's, which was asked for before.
2. Stationary traffic: a server answers every question at every budget. The budget on which the control law settles in a
   simulation over these answers, against the one that `calibrate` finds on them.
3. Overhead: requests a second at the same budget, with second answers and without, in turns.
"""

import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint, Host
from ficoco_vllm.benchmarks.accuracy.statistics import wilson
from ficoco_vllm.benchmarks.accuracy.workload import embedded
from ficoco_vllm.benchmarks.calibration.search import Ask, certify, search
from ficoco_vllm.benchmarks.harness.http import metric, served_model
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.benchmarks.quality.replay import Log, recorded
from ficoco_vllm.benchmarks.quality.traffic import EASY, FULL, HARD, PHASES, answers, send
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.simulation import Recorded, simulate

NUM_TOKENS = 576
# Fewer requests show a lower target.
LIVE_TARGET = 0.9
# Stationary traffic: few tokens are enough, all are needed, and a budget between.
STATIONARY: tuple[dict[str, Any], ...] = (
    {"name": "easy", "method": "ficoco-v", "kinds": EASY, "target": 0.98},
    {"name": "hard", "method": "ficoco-v", "kinds": HARD, "target": 0.98},
    # Its four reducing layers cannot reach 32 tokens.
    {
        "name": "hard-tome",
        "method": "tome",
        "kinds": HARD,
        "target": 0.95,
        "ladder": (64, 96, 128, 192, 288, 576),
    },
)
# One request in five may be compared, within the 3% that second answers may cost.
QUALITY = {"share": 0.2, "max_tokens_per_minute": 10_000_000}
# Of the overhead: rounds and their requests, and those in which the budget finds its rung before.
NUM_ROUNDS, NUM_REQUESTS, NUM_BEFORE = 6, 800, 1500
# Questions of `calibrate`: to search with, and to certify.
NUM_CALIBRATED = (1000, 3000)


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = make_parser(__doc__, "quality")
    add = parser.add_argument
    add("--count", type=int, default=5000, help="requests of each kind of traffic (default: %(default)s)")
    add("--items", type=int, default=100, help="questions of each type (default: %(default)s)")
    add("--method", default="ficoco-v", help="default: %(default)s")
    add("--answers", type=Path, default=Path("build/quality/answers"), help="folder, to continue from")
    args = parser.parse_args()
    live = _live(args.method, args.count, args.items, args.seed)
    stationary = [_stationary(traffic, args.items, args.seed, args.answers) for traffic in STATIONARY]
    overhead = _overhead(args.method, args.items, args.seed)
    head = {"environment": environment(), "seed": args.seed, "method": args.method, "quality": QUALITY}
    result = {**head, "live": live, "stationary": stationary, "overhead": overhead}
    write(result, args.out)
    print(json.dumps(result, indent=2))
    return report(bars(result))


def bars(result: dict[str, Any]) -> list[Bar]:
    """The bars."""
    live, stationary = result["live"], result["stationary"]
    easy, hard, again = (phase["visual_tokens_late"] for phase in live["phases"])
    num_requests = live["requests"] // len(live["phases"])
    highs = [wilson(round(phase["agreement"] * num_requests), num_requests)[1] for phase in live["phases"]]
    apart = [abs(row["settled_rung"] - row["calibrated_rung"]) for row in stationary]
    return [
        Bar("quality-agreement", live["high"], LIVE_TARGET),
        # A bad phase must not hide behind two good ones.
        Bar("quality-phase-agreement", min(highs), LIVE_TARGET),
        at_most("quality-easy-tokens", easy / NUM_TOKENS, 0.5),
        Bar("quality-hard-tokens-of-easy", hard / easy, 1.25),
        at_most("quality-easy-again-tokens-of-hard", again / hard, 0.9),
        at_most("quality-extra-tokens", live["extra"], 0.03),
        at_most("quality-rungs-from-calibrated", max(apart), 0),
        at_most("quality-overhead", result["overhead"]["time_ratio"], 1.05),
    ]


def _live(method: str, count: int, num_items: int, seed: int) -> dict[str, Any]:
    """Traffic that turns, to one server."""
    arguments = ["--ficoco-method", method, "--ficoco-target-agreement", str(LIVE_TARGET)]
    arguments += ["--ficoco-config", json.dumps({"quality": {**QUALITY, "seed": seed}})]
    with tempfile.TemporaryDirectory() as folder, serving(arguments, Path(folder) / "log") as server:
        endpoint = Endpoint(server.url, served_model(server.url, "none"), NUM_TOKENS)
        phases = []
        with Task("traffic that turns", len(PHASES) * count) as task:
            for number, kinds in enumerate(PHASES):
                items = embedded(kinds, num_items, seed)
                reference = asyncio.run(answers(endpoint, items, FULL))
                phases.append(asyncio.run(send(endpoint, items, reference, count, seed + number, task)))
        second = metric(server.url, "ficoco:quality_tokens_total")
        falls = metric(server.url, "ficoco:quality_falls")
    agreeing = sum(sum(phase.agreeing) for phase in phases)
    total = sum(len(phase.agreeing) for phase in phases)
    low, high = wilson(agreeing, total)
    return {
        "target": LIVE_TARGET,
        "requests": total,
        "agreement": agreeing / total,
        "low": low,
        "high": high,
        "extra": second / sum(phase.tokens for phase in phases),
        "falls": falls,
        "phases": [
            {
                "agreement": phase.agreement,
                "visual_tokens": phase.mean_kept(),
                "visual_tokens_late": phase.mean_kept(last=0.25),
            }
            for phase in phases
        ],
    }


def _stationary(traffic: dict[str, Any], num_items: int, seed: int, folder: Path) -> dict[str, Any]:
    """One row: the answers to its questions at every budget, and what they lead to."""
    settings = QualitySettings.parse(
        {**QUALITY, "seed": seed, "target_agreement": traffic["target"], "ladder": traffic.get("ladder")}
    ).on_model(NUM_TOKENS)
    items = embedded(traffic["kinds"], num_items, seed)
    log = Log(traffic["method"], settings, items, folder / f"{traffic['name']}.jsonl", Host())
    return {**traffic, **compared(settings, recorded(log))}


def compared(settings: QualitySettings, known: Sequence[Recorded]) -> dict[str, Any]:
    """The budget on which the control law settles and the one that `calibrate` finds, on the same traffic.

    Args:
        settings: with a ladder whose last rung keeps all tokens.
        known: questions of the traffic, from which its requests are drawn.
    """
    ladder, target, draw = settings.ladder or (), settings.target_agreement, random.Random(settings.seed)
    outcome = simulate(settings, [draw.choice(known) for _ in range(100_000)], per_second=1000.0)

    def ask(part: Sequence[Recorded]) -> Ask:
        return lambda budgets, count: {
            keep: round(sum(request.scores[ladder.index(keep)] for request in part[:count]))
            for keep in budgets
        }

    searched, fresh = ([draw.choice(known) for _ in range(count)] for count in NUM_CALIBRATED)
    candidate, _ = search(ladder[:-1], target, len(searched), ask(searched))
    safe = None
    if candidate is not None:
        safe, _ = certify(ladder[:-1], candidate, target, len(fresh), ask(fresh))
    settled, calibrated = outcome.settled[""], ladder[-1] if safe is None else safe.keep
    return {
        "target": target,
        "agreement_by_budget": {
            keep: statistics.fmean(request.scores[index] for request in known)
            for index, keep in enumerate(ladder)
        },
        "settled": settled,
        "calibrated": calibrated,
        "settled_rung": ladder.index(settled),
        "calibrated_rung": ladder.index(calibrated),
        "requests_until_settled": outcome.moves[-1].request if outcome.moves else None,
        "extra": outcome.extra,
        "agreement": outcome.agreement,
    }


def _overhead(method: str, num_items: int, seed: int) -> dict[str, Any]:
    """Seconds for the same requests with second answers and without, in turns on two servers."""
    items = embedded(EASY, num_items, seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quality = {**QUALITY, "seed": seed, "ladder": [64, NUM_TOKENS], "share": 1.0}
        held = ["--ficoco-target-agreement", "0.5", "--ficoco-config", json.dumps({"quality": quality})]
        both = {"with": held, "without": ["--ficoco-keep", "64"]}
        seconds: dict[str, list[float]] = {kind: [] for kind in both}
        kept = {}
        with (
            serving(["--ficoco-method", method, *both["with"]], folder / "with.log") as first,
            serving(["--ficoco-method", method, *both["without"]], folder / "without.log") as second,
        ):
            endpoints = {
                kind: Endpoint(server.url, served_model(server.url, "none"), NUM_TOKENS)
                for kind, server in (("with", first), ("without", second))
            }
            reference = asyncio.run(answers(endpoints["without"], items, FULL))
            total = NUM_BEFORE + 2 * NUM_ROUNDS * NUM_REQUESTS
            with Task("overhead of second answers", total) as task:
                asyncio.run(send(endpoints["with"], items, reference, NUM_BEFORE, seed, task))
                before = metric(first.url, "ficoco:quality_tokens_total")
                for number in range(NUM_ROUNDS):
                    for kind in (("with", "without"), ("without", "with"))[number % 2]:
                        begin = time.monotonic()
                        phase = asyncio.run(
                            send(endpoints[kind], items, reference, NUM_REQUESTS, number, task)
                        )
                        seconds[kind].append(time.monotonic() - begin)
                        kept[kind] = phase.mean_kept()
            spent = metric(first.url, "ficoco:quality_tokens_total") - before
    ratios = [on / off for on, off in zip(seconds["with"], seconds["without"], strict=True)]
    return {
        "time_ratio": statistics.median(ratios),
        "ratios": ratios,
        "visual_tokens": kept,
        "second_tokens": spent,
        "requests": NUM_ROUNDS * NUM_REQUESTS,
    }


if __name__ == "__main__":
    sys.exit(main())
