"""Signs that a server did not do what it was started for: throughput alone would not show them."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.load.settings import STOCK, Server


def doubts(
    rows: Sequence[Mapping[str, Any]], servers: Sequence[Server], num_visual_tokens: int | None
) -> list[str]:
    """Rows of which a server's own counters say something else than its row.

    In a round all servers see the same prompts. A method of the tower makes each of them shorter than stock vLLM's by
    what leaves; one of the decoder does not, there the blocks that it did not take must be some.

    Args:
        rows: of `run_turns`.
        servers: that ran.
        num_visual_tokens: of an image without reduction, or None where the model does not say.

    Returns:
        A line for each such server, of its first row.
    """
    stock = {(row["round"], row["point"]): row for row in rows if row["server"] == STOCK}
    by_name = {server.name: server for server in servers}
    found: dict[str, str] = {}
    for row in rows:
        server = by_name[row["server"]]
        doubt = _doubt(row, server, stock.get((row["round"], row["point"])), num_visual_tokens)
        if doubt is not None:
            found.setdefault(server.name, f"{server.name}, {row['point']}: {doubt}")
    return list(found.values())


def _doubt(
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
