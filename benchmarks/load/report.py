"""The report of a load test: tables and page."""

from collections.abc import Mapping
from typing import Any

from ficoco_vllm.benchmarks.harness.report import Page, Section, Table, facts
from ficoco_vllm.benchmarks.load.plots import plots
from ficoco_vllm.benchmarks.load.settings import STOCK
from ficoco_vllm.benchmarks.load.summary import Rows, ratio

# A percentile that fewer values than this lie above is marked.
_MARK = "†"
_LATENCIES = "Latencies: the dot is the median, the bar ends at the 90th percentile, the line at the 99th."
_SPEEDUP = "Speed-up: requests/s over stock vLLM's in the same round. TTFT: time to first token. ITL: between tokens."
_FEW = "requests in a round are too few for this percentile. Raise `--requests`."
_LATENCY_HEAD = (
    *("server", "load", "requests/s", "speed-up", "TTFT p50, s", "TTFT p90, s", "TTFT p99, s"),
    *("ITL p50, ms", "ITL p99, ms"),
)
_MEMORY_HEAD = ("server", "load", "running requests, most", "KV cache in use, most", "preemptions")


def page(result: Mapping[str, Any]) -> Page:
    """The report of a result."""
    rows, summary = result["rows"], result["summary"]
    traffic = rows[0]["traffic"]
    setting = (
        f"Each request: one image, never sent before, and {traffic['num_text_tokens']} tokens of text in, "
        f"{traffic['num_answer_tokens']} tokens out. {traffic['num_requests']} requests a point and round, "
        f"{result['num_rounds']} round{'s' * (result['num_rounds'] > 1)} in which the servers take turns. "
        "Figures are medians over the rounds, with the smallest and largest in brackets."
    )
    return Page(
        title="Load test",
        lead=_lead(rows, summary),
        warnings=result["warnings"],
        sections=[
            Section("Results", lines=[setting], tables=tables(rows, summary)),
            Section("Plots", lines=[_LATENCIES], plots=plots(rows, summary)),
        ],
        facts=facts(
            result["environment"],
            **{name: result.get(name) for name in ("model", "command", "seed", "remark")},
        ),
    )


def tables(rows: Rows, summary: Rows) -> list[Table]:
    """Throughput and latency; memory and scheduling."""
    traffic = rows[0]["traffic"]
    num_requests = traffic["num_requests"]
    num_gaps = num_requests * (traffic["num_answer_tokens"] - 1)
    latency, memory = [], []
    for row in summary:
        head = (f"`{row['server']}`", row["point"])
        speedup = _speedup(rows, row["server"], row["point"])
        latency.append(
            (
                *(*head, _throughput(row), "-" if speedup is None else f"{speedup:.2f}x"),
                *(_percentile(row, "ttft", p, num_requests, 1e-3, ".3f") for p in (50, 90, 99)),
                *(_percentile(row, "itl", p, num_gaps, 1.0, ".1f") for p in (50, 99)),
            )
        )
        figures = (("num_running_max", ".0f"), ("kv_cache_usage_max", ".0%"), ("num_preemptions", ".0f"))
        cells = ("-" if row[name] is None else f"{row[name]:{form}}" for name, form in figures)
        memory.append((*head, *cells))
    notes = [_SPEEDUP]
    if any(cell.endswith(_MARK) for cells in latency for cell in cells):
        notes.append(f"{_MARK} Close to the largest value: {num_requests} {_FEW}")
    return [
        Table("throughput", "Throughput and latency", _LATENCY_HEAD, latency, notes),
        Table("memory", "Memory and scheduling", _MEMORY_HEAD, memory),
    ]


def _lead(rows: Rows, summary: Rows) -> list[str]:
    """Speed-up of each server at the last point."""
    point = summary[-1]["point"]
    factors = {
        row["server"]: factor
        for row in summary
        if row["point"] == point and row["server"] != STOCK
        if (factor := _speedup(rows, row["server"], point)) is not None
    }
    words = ", ".join(f"`{server}` {factor:.2f}x" for server, factor in factors.items())
    return [f"Requests per second over stock vLLM, {point}: {words}."] if words else []


def _speedup(rows: Rows, server: str, point: str) -> float | None:
    if not any(row["server"] == STOCK and row["point"] == point for row in rows):
        return None
    return ratio(rows, "request_throughput", server, STOCK, point)


def _throughput(row: Mapping[str, Any]) -> str:
    median, low, high = (row[f"request_throughput{end}"] for end in ("", "_min", "_max"))
    return f"{median:.2f} ({low:.2f}-{high:.2f})" if row["num_rounds"] > 1 else f"{median:.2f}"


def _percentile(row: Mapping[str, Any], name: str, percent: int, count: int, factor: float, form: str) -> str:
    few = count * (100 - percent) < 100
    return f"{row[f'{name}_ms_p{percent}'] * factor:{form}}" + f" {_MARK}" * few
