"""Replay of a log: every question answered at every budget, then the control law on those answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import CONCURRENCY, Host, endpoint, pairs, replay
from ficoco_vllm.benchmarks.accuracy.statistics import wilson
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full, server_method, site_of
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.report import Table
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.simulation import Recorded, Replayed, simulate

# Parts of the log whose figures the report shows.
NUM_PARTS = 10


@dataclass(frozen=True)
class Log:
    """A log of requests, and how its answers are got.

    Attributes:
        method: method of the server.
        settings: settings of the target, with a ladder.
        items: questions, in the order of the log.
        answers: JSONL file; an interrupted run continues from it.
        max_tokens: most tokens of an answer.
    """

    method: str
    settings: QualitySettings
    items: Sequence[Item]
    answers: Path
    host: Host
    max_tokens: int = 16
    concurrency: int = CONCURRENCY


def recorded(log: Log) -> list[Recorded]:
    """Answer every question at every rung, and with all tokens; the kind of a question is its class of traffic.

    Raises:
        ValueError: the answers on disk are those of another run.
        RuntimeError: a server does not start.
        openai.APIError: a server refuses a question.
    """
    site = site_of(log.method)
    ladder = log.settings.ladder or ()
    most = log.host.num_tokens
    reference = full(site)
    rungs = [reference if keep >= most else Variant(log.method, site, log.method, keep) for keep in ladder]
    unique = list({item.name: item for item in log.items}.values())
    run = {**log.host.identity, "workload": [item.name for item in unique], "tokens": log.max_tokens}
    served = server_method(log.method, site)
    with (
        Store(log.answers, run) as store,
        endpoint(log.host, served, [], max_tokens=log.max_tokens) as server,
    ):
        variants = list({variant.key: variant for variant in (reference, *rungs)}.values())
        replay(
            server, pairs(variants, unique), store, log.concurrency, f"{log.method}: the log at every budget"
        )
        found = {}
        for item in unique:
            before = store[reference.key, item.name]
            after = [store[rung.key, item.name] for rung in rungs]
            # Every token of a short answer is a few of hundreds; the log keeps its text, not its tokens.
            found[item.name] = Recorded(
                tuple(float(reply.text == before.text) for reply in after),
                tuple(reply.prompt_tokens for reply in after),
                before.prompt_tokens,
                item.kind,
            )
    return [found[item.name] for item in log.items]


def dry_run(log: Log, repeat: int, per_second: float) -> dict[str, Any]:
    """What a server with this target would have done on the log.

    Args:
        log: log of requests.
        repeat: times that the log is served, one after the other.
        per_second: rate of its requests.

    Returns:
        The report as it is written to JSON.
    """
    requests = recorded(log) * repeat
    top_reduces = (log.settings.ladder or (0,))[-1] < log.host.num_tokens
    outcome = simulate(log.settings, requests, top_reduces=top_reduces, per_second=per_second)
    return {
        "schema": 1,
        "environment": environment(),
        "model": log.host.model or "demo",
        "method": log.method,
        "settings": log.settings.model_dump(mode="json"),
        "requests": len(requests),
        "agreement": round(outcome.agreement, 4),
        "visual_tokens": round(sum(outcome.keeps) / len(outcome.keeps), 1),
        "extra": round(outcome.extra, 4),
        "compared": outcome.num_compared,
        "settled": outcome.settled,
        "moves": [vars(move) for move in outcome.moves],
        "parts": parts(outcome, NUM_PARTS),
    }


def parts(outcome: Replayed, count: int) -> list[dict[str, Any]]:
    """Figures of `count` equal parts of a log, in order; fewer where there are fewer requests."""
    total = len(outcome.scores)
    edges = [total * part // count for part in range(count + 1)]
    rows = []
    for begin, end in pairwise(edges):
        if end > begin:
            agreeing = sum(outcome.scores[begin:end])
            low, high = wilson(round(agreeing), end - begin)
            rows.append(
                {
                    "from": begin,
                    "to": end,
                    "agreement": round(agreeing / (end - begin), 4),
                    "low": round(low, 4),
                    "high": round(high, 4),
                    "visual_tokens": round(sum(outcome.keeps[begin:end]) / (end - begin), 1),
                }
            )
    return rows


def tables(report: dict[str, Any]) -> list[Table]:
    """The report for the terminal: what was served in each part of the log, and every change."""
    served = Table(
        "parts",
        f"{report['method']} at a target agreement of {report['settings']['target_agreement']:g}",
        ("requests", "visual tokens", "agreement"),
        [
            [f"{row['from']}-{row['to'] - 1}", f"{row['visual_tokens']:g}", f"{row['agreement']:.1%}"]
            for row in report["parts"]
        ],
    )
    moves = Table(
        "moves",
        "Changes of the budget",
        ("after request", "class", "visual tokens"),
        [[str(move["request"]), move["traffic"], str(move["keep"])] for move in report["moves"]],
    )
    return [served, moves] if report["moves"] else [served]


def lines(report: dict[str, Any]) -> list[str]:
    """The report in words."""
    settled = ", ".join(f"{keep}{f' ({name})' if name else ''}" for name, keep in report["settled"].items())
    return [
        f"{report['requests']} requests, of which {report['compared']} were answered a second time: "
        f"{report['extra']:.1%} more tokens",
        f"agreement {report['agreement']:.1%} with {report['visual_tokens']:g} visual tokens on average; at the end: "
        f"{settled}",
    ]
