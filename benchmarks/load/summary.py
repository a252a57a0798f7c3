"""Rows of a load test, one line for each server and point: medians over the rounds, with their spread."""

import csv
import statistics
from collections.abc import Mapping, Sequence
from io import StringIO
from typing import Any

from ficoco_vllm.benchmarks.load.settings import STOCK

# Figures of a row, in the order of the CSV's columns.
FIGURES = (
    "request_throughput",
    "output_throughput",
    *(f"{name}_ms_p{p}" for name in ("ttft", "itl", "tpot", "e2el") for p in (50, 90, 99)),
    "num_running_max",
    "kv_cache_usage_max",
    "num_preemptions",
)


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds.

    Args:
        rows: of `run_turns`.

    Returns:
        For each point and server, stock first: `server`, `point`, `num_rounds`, and for each
        of `FIGURES` its median, with `_min` and `_max` beside it; None where /metrics did not say.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["point"], row["server"] != STOCK, row["server"])):
        groups.setdefault((row["server"], row["point"]), []).append(row)
    return [
        {"server": server, "point": point, "num_rounds": len(members), **_spread(members)}
        for (server, point), members in groups.items()
    ]


def ratio(rows: Sequence[Mapping[str, Any]], figure: str, server: str, base: str, point: str) -> float:
    """Median over the rounds of one server's figure over another's in the same round.

    Args:
        rows: of `run_turns`.
        figure: one of `FIGURES`.
        server: whose figure is the numerator.
        base: whose figure is the denominator.
        point: at which.
    """
    figures = {(row["server"], row["round"]): float(row[figure]) for row in rows if row["point"] == point}
    rounds = sorted({number for name, number in figures if name == base})
    return statistics.median(figures[server, number] / figures[base, number] for number in rounds)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every row, without its samples over time.

    Args:
        rows: of `run_turns`.
    """
    columns = ("server", "round", "point", "seed", "completed", "failed", "duration", *FIGURES)
    text = StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary in Markdown, for the README.

    Args:
        summary: of `summarise`.
    """
    lines = [
        "| load | server | requests/s | TTFT p50 | TTFT p99 | ITL p50 | concurrent | KV cache, most | preemptions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        lines.append(
            f"| {row['point']} | {row['server']} | {_ranged(row, 'request_throughput', 2)} "
            f"| {_seconds(row, 'ttft_ms_p50')} | {_seconds(row, 'ttft_ms_p99')} "
            f"| {row['itl_ms_p50']:.0f} ms | {_count(row['num_running_max'])} "
            f"| {_percent(row['kv_cache_usage_max'])} | {_count(row['num_preemptions'])} |"
        )
    return "\n".join(lines)


def _spread(members: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    spread: dict[str, float | None] = {}
    for figure in FIGURES:
        values = [float(row[figure]) for row in members if row[figure] is not None]
        spread[figure] = statistics.median(values) if values else None
        spread[f"{figure}_min"] = min(values, default=None)
        spread[f"{figure}_max"] = max(values, default=None)
    return spread


def _ranged(row: Mapping[str, Any], figure: str, digits: int) -> str:
    return f"{row[figure]:.{digits}f} ({row[f'{figure}_min']:.{digits}f}-{row[f'{figure}_max']:.{digits}f})"


def _seconds(row: Mapping[str, Any], figure: str) -> str:
    return f"{row[figure] / 1000:.2f} s"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"
