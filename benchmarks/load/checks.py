"""Checks that servers reduced as configured, which throughput alone would not show."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.load.settings import STOCK, Server


def check(
    rows: Sequence[Mapping[str, Any]], servers: Sequence[Server], num_visual_tokens: int | None
) -> list[str]:
    """Servers whose own counters contradict their configuration.

    In a round all servers see the same prompts. A method of the tower shortens each of them, compared with stock vLLM,
    by the tokens that it removes; one of the decoder does not, and must have avoided some KV slots.

    Args:
        rows: of `run_turns`.
        servers: that ran.
        num_visual_tokens: of an image without reduction, or None if unknown.

    Returns:
        A line for each such server, about its first row.
    """
    stock = {(row["round"], row["point"]): row for row in rows if row["server"] == STOCK}
    by_name = {server.name: server for server in servers}
    problems: dict[str, str] = {}
    for row in rows:
        server = by_name[row["server"]]
        problem = _problem(row, server, stock.get((row["round"], row["point"])), num_visual_tokens)
        if problem is not None:
            problems.setdefault(server.name, f"{server.name}, {row['point']}: {problem}")
    return list(problems.values())


def _problem(
    row: Mapping[str, Any], server: Server, stock: Mapping[str, Any] | None, num_visual_tokens: int | None
) -> str | None:
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
