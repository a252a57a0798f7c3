"""`make bench-quality`: a target agreement on traffic that turns from easy to hard and back.

Three parts, on the demo model:
1. Traffic: colours and shapes, then numbers, then colours and shapes again, none naming a budget. Each answer is
   compared with the full model's, which was asked for before.
2. Stationary traffic: a server answers every question at every budget. The budget on which the control law settles in a
   simulation over these answers, against the one that `calibrate` finds on them.
3. Overhead: requests a second at the same budget, with second answers and without, in turns.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint, Host, endpoint
from ficoco_vllm.benchmarks.accuracy.statistics import wilson
from ficoco_vllm.benchmarks.accuracy.workload import embedded
from ficoco_vllm.benchmarks.calibration.search import Ask, certify, search
from ficoco_vllm.benchmarks.harness.http import metric
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, environment, make_parser, report, write
from ficoco_vllm.benchmarks.harness.rounds import ratios
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.benchmarks.quality.replay import recorded
from ficoco_vllm.benchmarks.quality.traffic import EASY, HARD, PHASES, reference, send
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.simulation import Recorded, simulate

METHOD, NUM_TOKENS = "ficoco-v", 576
# Questions of each type.
NUM_ITEMS = 100
# Fewer requests show a lower target.
LIVE_TARGET = 0.9
# Stationary traffic: few tokens are enough, all are needed, and a budget between.
STATIONARY: tuple[dict[str, Any], ...] = (
    {"name": "easy", "method": METHOD, "kinds": EASY, "target": 0.98},
    {"name": "hard", "method": METHOD, "kinds": HARD, "target": 0.98},
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
# Measurement of the overhead: rounds, requests of each, and requests before them, in which the budget settles.
NUM_ROUNDS, NUM_REQUESTS, NUM_BEFORE = 6, 800, 1500
# Questions of `calibrate`: to search with, and to certify.
NUM_CALIBRATED = (1000, 3000)


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = make_parser(__doc__, "quality")
    parser.add_argument(
        "--count", type=int, default=5000, help="requests of each kind of traffic (default: %(default)s)"
    )
    args = parser.parse_args()
    folder = args.out.with_suffix("") / "answers"  # an interrupted run continues from them
    result = {
        "environment": environment(),
        "seed": args.seed,
        "method": METHOD,
        "quality": QUALITY,
        "live": _live(args.count, args.seed),
        "stationary": [_stationary(traffic, args.seed, folder) for traffic in STATIONARY],
        "overhead": _overhead(args.seed),
    }
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


def _server(**quality: Any) -> AbstractContextManager[Endpoint]:
    """A server with a target, whose settings are those of `QUALITY` and others."""
    config = json.dumps({"quality": {**QUALITY, **quality}})
    return endpoint(Host(arguments=("--ficoco-config", config)), METHOD, [])


def _live(count: int, seed: int) -> dict[str, Any]:
    """Traffic that turns, to one server."""
    with _server(target_agreement=LIVE_TARGET, seed=seed) as server:
        phases = []
        with Task("traffic that turns", len(PHASES) * count) as task:
            for number, kinds in enumerate(PHASES):
                items = embedded(kinds, NUM_ITEMS, seed)
                phases.append(send(server, items, reference(server, items), count, seed + number, task))
        second = metric(server.url, "ficoco:quality_tokens_total")
        falls = metric(server.url, "ficoco:quality_falls")
    agreeing = [agrees for phase in phases for agrees in phase.agreeing]
    low, high = wilson(sum(agreeing), len(agreeing))
    return {
        "target": LIVE_TARGET,
        "requests": len(agreeing),
        "agreement": fmean(agreeing),
        "low": low,
        "high": high,
        "extra": second / sum(phase.num_tokens for phase in phases),
        "falls": falls,
        "phases": [
            {
                "agreement": fmean(phase.agreeing),
                "visual_tokens": fmean(phase.kept),
                "visual_tokens_late": fmean(phase.kept[3 * count // 4 :]),
            }
            for phase in phases
        ],
    }


def _stationary(traffic: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    """One row: the answers to its questions at every budget, and what they lead to."""
    settings = QualitySettings.parse(
        {**QUALITY, "seed": seed, "target_agreement": traffic["target"], "ladder": traffic.get("ladder")}
    ).on_model(NUM_TOKENS)
    items = embedded(traffic["kinds"], NUM_ITEMS, seed)
    answers = folder / f"{traffic['name']}.jsonl"
    requests = recorded(Host(), traffic["method"], settings.ladder or (), items, answers)
    # The whole log is one class of traffic.
    return {**traffic, **compared(settings, [replace(request, traffic="") for request in requests])}


def compared(settings: QualitySettings, known: Sequence[Recorded]) -> dict[str, Any]:
    """The budget on which the control law settles and the one that `calibrate` finds, on the same traffic.

    Its requests are drawn from the known ones; the last rung of the ladder keeps all tokens.
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
            keep: fmean(request.scores[index] for request in known) for index, keep in enumerate(ladder)
        },
        "settled": settled,
        "calibrated": calibrated,
        "settled_rung": ladder.index(settled),
        "calibrated_rung": ladder.index(calibrated),
        "requests_until_settled": outcome.moves[-1].request if outcome.moves else None,
        "extra": outcome.extra,
        "agreement": outcome.agreement,
    }


def _overhead(seed: int) -> dict[str, Any]:
    """Seconds for the same requests with second answers and without, in turns on two servers."""
    items = embedded(EASY, NUM_ITEMS, seed)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    kept = {}
    with (
        _server(target_agreement=0.5, seed=seed, ladder=[64, NUM_TOKENS], share=1.0) as comparing,
        endpoint(Host(arguments=("--ficoco-keep", "64")), METHOD, []) as plain,
    ):
        servers, expected = {"with": comparing, "without": plain}, reference(plain, items)
        total = NUM_BEFORE + 2 * NUM_ROUNDS * NUM_REQUESTS
        with Task("overhead of second answers", total) as task:
            send(comparing, items, expected, NUM_BEFORE, seed, task)
            before = metric(comparing.url, "ficoco:quality_tokens_total")
            for number in range(NUM_ROUNDS):
                for kind in (("with", "without"), ("without", "with"))[number % 2]:
                    begin = time.monotonic()
                    phase = send(servers[kind], items, expected, NUM_REQUESTS, number, task)
                    seconds[kind].append(time.monotonic() - begin)
                    kept[kind] = fmean(phase.kept)
        spent = metric(comparing.url, "ficoco:quality_tokens_total") - before
    times = ratios(seconds["with"], seconds["without"])
    return {
        "time_ratio": median(times),
        "ratios": times,
        "visual_tokens": kept,
        "second_tokens": spent,
        "requests": NUM_ROUNDS * NUM_REQUESTS,
    }


if __name__ == "__main__":
    sys.exit(main())
