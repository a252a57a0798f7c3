"""The README's table."""

from collections.abc import Iterator, Mapping
from typing import Any

from ficoco_vllm.benchmarks.overview.settings import (
    Measured,
    Results,
    Setting,
    collect,
    largest_load,
    shallowest,
)
from ficoco_vllm.benchmarks.ttft.kinds import NUM_TEXT_TOKENS, WHOLE_MODEL

# Their environments stand below the table; accuracy's own is on its page too.
_COMMANDS = {
    "ttft": "make bench-ttft",
    "load": "make bench-load",
    "concurrency": "make bench-concurrency",
    "accuracy": "make bench-accuracy",
    "accuracy-decoder": "make bench-accuracy-decoder",
}


def markdown(results: Results) -> list[str]:
    """Lines of the table and of what its figures rest on.

    Only settings stand in it of which more than accuracy was measured; a cell without a measurement is empty, a column
    without one is left out.

    Args:
        results: name of each benchmark to its committed JSON.
    """
    rows = {setting: row for setting, row in collect(results).items() if row.is_served}
    columns = [
        (title, cells)
        for title, cells in _columns(results, rows).items()
        if any(cells) or title == "visual tokens"
    ]
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "|" + "---|" * len(columns),
    ]
    for index in range(len(rows)):
        lines.append("| " + " | ".join(cells[index] for _, cells in columns) + " |")
    return [*lines, "", *_notes(results), _machines(results)]


def _columns(results: Results, rows: Mapping[Setting, Measured]) -> dict[str, list[str]]:
    layers = shallowest(results["ttft"])["layers"] if "ttft" in results else 0
    several = "load" in results and results["load"]["num_rounds"] > 1
    values = rows.values()
    return {
        "visual tokens": [setting.label for setting in rows],
        "accuracy, demo model": [_accuracy(row.accuracy) for row in values],
        f"first token, {layers} layers": [_seconds(row.ttft) for row in values],
        "as fast (FLOPs say)": [_speedup(row.ttft) for row in values],
        f"{WHOLE_MODEL} layers, extrapolated": [_speedup(row.ttft_whole) for row in values],
        "requests/s": [_throughput(row.load, several) for row in values],
        "KV cache of the prompt": [f"{setting.kv_megabytes():.0f} MB" for setting in rows],
        "requests at once": [_at_once(row.concurrency) for row in values],
    }


def _accuracy(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    against = row.get("against_full")
    if against is None:
        return f"{row['accuracy']:.1f}"
    low, high = against["interval"]
    return f"{row['accuracy']:.1f} ({low:+.1f} to {high:+.1f})"


def _seconds(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = row["ttft_seconds_min"], row["ttft_seconds_max"]
    return f"{row['ttft_seconds_median']:.2f} s ({low:.2f}-{high:.2f})"


def _speedup(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['speedup']:.2f}x ({row['predicted_speedup']:.2f}x)"


def _throughput(row: Mapping[str, Any] | None, several: bool) -> str:
    if row is None:
        return ""
    low, high = row["request_throughput_min"], row["request_throughput_max"]
    spread = f" ({low:.2f}-{high:.2f})" if several else ""
    return f"{row['request_throughput']:.2f}{spread}"


def _at_once(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['num_running']} ({row['ratio']:.2f}x)"


def _notes(results: Results) -> Iterator[str]:
    """What each column was measured on, and by which command."""
    if "accuracy" in results:
        commands = [f"`{_COMMANDS[name]}`" for name in ("accuracy", "accuracy-decoder") if name in results]
        yield (
            f"- Accuracy ({', '.join(commands)}): the demo model's own world, {_asked(results['accuracy'])} questions "
            "a row, change against all tokens as a 95% interval of a paired bootstrap. It is no LLaVA-1.5: "
            "[docs/accuracy.md](docs/accuracy.md)."
        )
    if "ttft" in results:
        ttft = results["ttft"]
        run, depths = shallowest(ttft), " and ".join(str(run["layers"]) for run in ttft["runs"])
        yield (
            f"- First token (`make bench-ttft`): LLaVA-1.5-7B's true shapes, random weights, decoder cut to {depths} "
            f"of {WHOLE_MODEL} layers, {ttft['dtype']}, one image and {NUM_TEXT_TOKENS} tokens of text; medians "
            f"(min-max) of {run['rounds']} rounds in which stock vLLM and ours take turns."
        )
    if "load" in results:
        load = results["load"]
        traffic = next(row["traffic"] for row in load["rows"] if row["point"] == largest_load(load))
        yield (
            f"- Requests/s (`make bench-load`): {load['model']}, {traffic['concurrency']} open requests, "
            f"one image and {traffic['num_text_tokens']} tokens of text in, {traffic['num_answer_tokens']} tokens out; "
            f"{_rounds(load['num_rounds'])} of {traffic['num_requests']} requests, no image twice"
            f"{'; ' + load['remark'] if load.get('remark') else ''}."
        )
    yield (
        f"- KV cache: LLaVA-1.5-7B, {NUM_TEXT_TOKENS} tokens of text, fp16, by the planner (`ficoco-vllm plan`)."
    )
    if "concurrency" in results:
        yield (
            "- Requests at once (`make bench-concurrency`): counted under the same KV memory, "
            f"{WHOLE_MODEL} layers, LLaVA-1.5-7B's token counts, a toy's width."
        )


def _rounds(number: int) -> str:
    return f"medians (min-max) of {number} rounds" if number > 1 else "one round"


def _asked(result: Mapping[str, Any]) -> int:
    row = next(row for row in result["rows"] if row["table"] == "methods")
    return sum(kind["count"] for kind in row["kinds"].values())


def _machines(results: Results) -> str:
    """Hardware and versions, once where they are the same everywhere."""
    described: dict[str, list[str]] = {}
    for name, command in _COMMANDS.items():
        if name in results:
            described.setdefault(_machine(results[name]["environment"]), []).append(f"`{command}`")
    if len(described) == 1:
        return f"- All on {next(iter(described))}."
    return "- " + "; ".join(f"{', '.join(commands)} on {text}" for text, commands in described.items()) + "."


def _machine(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    return f"{environment['cores']} cores of an {environment['cpu']}, no GPU; {versions}"
