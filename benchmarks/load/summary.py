"""Rows of a load test, one line for each server and point: medians over the rounds, with their spread."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.harness.results import csv_text
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

    Returns:
        For each point and server, by load and stock first: `server`, `point`, `num_rounds`, and for each
        of `FIGURES` its median, with `_min` and `_max` beside it; None where /metrics did not say.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=_place):
        groups.setdefault((row["server"], row["point"]), []).append(row)
    return [
        {"server": server, "point": point, "num_rounds": len(members), **_spread(members)}
        for (server, point), members in groups.items()
    ]


def ratio(rows: Sequence[Mapping[str, Any]], figure: str, server: str, base: str, point: str) -> float:
    """Median over the rounds of one server's figure over another's in the same round."""
    figures = {(row["server"], row["round"]): float(row[figure]) for row in rows if row["point"] == point}
    rounds = sorted({number for name, number in figures if name == base})
    return statistics.median(figures[server, number] / figures[base, number] for number in rounds)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every row, without its samples over time."""
    return csv_text(("server", "round", "point", "seed", "completed", "failed", "duration", *FIGURES), rows)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    rate, concurrency = row["traffic"]["rate"], row["traffic"]["concurrency"]
    return rate is None, rate or concurrency, row["server"] != STOCK, row["server"]


def _spread(members: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    spread: dict[str, float | None] = {}
    for figure in FIGURES:
        values = [float(row[figure]) for row in members if row[figure] is not None]
        spread[figure] = statistics.median(values) if values else None
        spread[f"{figure}_min"] = min(values, default=None)
        spread[f"{figure}_max"] = max(values, default=None)
    return spread
