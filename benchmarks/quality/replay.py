"""Replay of a log: every question answered at every budget, then the control law on those answers."""

from collections.abc import Sequence
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


def recorded(
    host: Host,
    method: str,
    ladder: Sequence[int],
    items: Sequence[Item],
    answers: Path,
    max_tokens: int = 16,
    concurrency: int = CONCURRENCY,
) -> list[Recorded]:
    """Answer every question of a log at every rung, and with all tokens; a question's kind is its class of traffic.

    An interrupted run continues from `answers`, a JSONL file.

    Raises:
        ValueError: the answers on disk are those of another run.
        RuntimeError: a server does not start.
        openai.APIError: a server refuses a question.
    """
    site = site_of(method)
    reference = full(site)
    rungs = [reference if keep >= host.num_tokens else Variant(method, site, method, keep) for keep in ladder]
    unique = list({item.name: item for item in items}.values())
    run = {**host.identity, "workload": [item.name for item in unique], "tokens": max_tokens}
    with (
        Store(answers, run) as store,
        endpoint(host, server_method(method, site), [], max_tokens=max_tokens) as server,
    ):
        variants = list({variant.key: variant for variant in (reference, *rungs)}.values())
        replay(server, pairs(variants, unique), store, concurrency, f"{method}: the log at every budget")
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
    return [found[item.name] for item in items]


def dry_run(
    host: Host, method: str, settings: QualitySettings, requests: Sequence[Recorded], per_second: float
) -> dict[str, Any]:
    """The report, as it is written to JSON, of what a server with a target would have done on some requests."""
    top_reduces = (settings.ladder or (0,))[-1] < host.num_tokens
    outcome = simulate(settings, requests, top_reduces=top_reduces, per_second=per_second)
    return {
        "schema": 1,
        "environment": environment(),
        "model": host.model or "demo",
        "method": method,
        "settings": settings.model_dump(mode="json"),
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
