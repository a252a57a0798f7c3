"""Rows of a load test: medians over the rounds, and whether the servers reduced as configured."""

import statistics
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.harness.results import csv_text
from ficoco_vllm.benchmarks.load.settings import STOCK, Server

# Figures of a row, in the order of the CSV's columns.
FIGURES = (
    *("request_throughput", "output_throughput"),
    *(f"{name}_ms_p{p}" for name in ("ttft", "itl", "tpot", "e2el") for p in (50, 90, 99)),
    *("num_running_max", "kv_cache_usage_max", "num_preemptions"),
)
Row = Mapping[str, Any]
Rows = Sequence[Row]


def summarise(rows: Rows) -> list[dict[str, Any]]:
    """Medians over the rounds of each server at each point, by load and stock first.

    Each of `FIGURES` comes with its `_min` and `_max`, which are None where /metrics does not have it.
    """
    summary = []
    for (server, point), group in groupby(sorted(rows, key=_place), itemgetter("server", "point")):
        members = list(group)
        row: dict[str, Any] = {"server": server, "point": point, "num_rounds": len(members)}
        for figure in FIGURES:
            values = [float(member[figure]) for member in members if member[figure] is not None]
            row[figure] = statistics.median(values) if values else None
            row[f"{figure}_min"] = min(values, default=None)
            row[f"{figure}_max"] = max(values, default=None)
        summary.append(row)
    return summary


def ratio(rows: Rows, figure: str, server: str, base: str, point: str) -> float:
    """Median over the rounds of one server's figure over another's in the same round."""
    figures = {(row["server"], row["round"]): float(row[figure]) for row in rows if row["point"] == point}
    rounds = sorted({number for name, number in figures if name == base})
    return statistics.median(figures[server, number] / figures[base, number] for number in rounds)


def as_csv(rows: Rows) -> str:
    """Every row, without its samples over time."""
    return csv_text(("server", "round", "point", "seed", "completed", "duration", *FIGURES), rows)


def check(rows: Rows, servers: Sequence[Server], num_visual_tokens: int | None) -> list[str]:
    """Servers whose own counters contradict their configuration, which throughput alone would not show.

    In a round all servers see the same prompts. A method of the tower shortens each of them, compared with stock vLLM,
    by the tokens that it removes; one of the decoder does not, and must have avoided some KV slots.

    Returns:
        A line for each such server, about its first row.
    """
    stock = {(row["round"], row["point"]): row for row in rows if row["server"] == STOCK}
    by_name = {server.name: server for server in servers}
    problems: dict[str, str] = {}
    for row in rows:
        name, base = row["server"], stock.get((row["round"], row["point"]))
        if problem := _problem(row, by_name[name], base, num_visual_tokens):
            problems.setdefault(name, f"{name}, {row['point']}: {problem}")
    return list(problems.values())


def _problem(row: Row, server: Server, stock: Row | None, num_visual_tokens: int | None) -> str | None:
    if row["num_prompt_tokens"] is None:
        return None  # no /metrics
    by = row["reduced_by"]
    if server.method is None:
        return f"stock vLLM reduces by {', '.join(by)}" if by else None
    if server.keep is not None and server.keep == num_visual_tokens:
        return None
    if by != [server.method]:
        return f"the server reduces by {', '.join(by) or 'nothing'}, not by {server.method}"
    if site_of(server.method) != "tower" or stock is None or server.keep is None or num_visual_tokens is None:
        return None
    saved = (stock["num_prompt_tokens"] - row["num_prompt_tokens"]) / row["completed"]
    expected = num_visual_tokens - server.keep
    if saved != expected:
        return f"prompts are shorter than stock vLLM's by {saved:g} tokens, not by {expected}"
    return None


def _place(row: Row) -> tuple[Any, ...]:
    rate, concurrency = row["traffic"]["rate"], row["traffic"]["concurrency"]
    return rate is None, rate or concurrency, row["server"] != STOCK, row["server"]
