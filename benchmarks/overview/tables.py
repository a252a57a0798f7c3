"""Generated text: tables of the README and of docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.harness.pages import table
from ficoco_vllm.benchmarks.overview.rows import (
    ALL_ROWS,
    FICOCO_V,
    PATCHES,
    README_METHODS,
    README_ROWS,
    STOCK,
    Results,
    Row,
    accuracies,
    full_accuracy,
    largest_load,
    shallowest,
)
from ficoco_vllm.reduction.advice import as_markdown

_TITLES = {"ficoco-v": "FiCoCo-V", "ficoco-vl": "FiCoCo-VL", "ficoco-l": "FiCoCo-L"}


def blocks(results: Results) -> dict[str, list[str]]:
    """Lines of every generated block, by the name in its markers.

    Args:
        results: name of each benchmark to its committed JSON.
    """
    return {
        "savings": savings(results),
        "accuracy": accuracy(results),
        "advice": as_markdown().splitlines(),
        "ttft": ttft(results),
        "load": load(results),
        "machines": machines(results),
    }


def savings(results: Results) -> list[str]:
    """The README's table of what a method saves."""
    stock = STOCK.kv_megabytes(results)
    rows = []
    for row in README_ROWS:
        kv, counted = row.kv_megabytes(results), results["concurrency"]["kinds"][row.concurrency]
        first = shallowest(results)["kinds"][row.ttft]
        cells = [f"{first['ttft_seconds_median']:.1f} s", f"{kv:.0f} MB", str(counted["num_running"])]
        if row is not STOCK:
            factors = (first["speedup"], stock / kv, counted["ratio"])
            words = (" faster", " smaller", "")
            cells = [
                f"{cell} ({factor:.1f}x{word})"
                for cell, factor, word in zip(cells, factors, words, strict=True)
            ]
        rows.append([row.label, row.tokens, *cells])
    header = (
        "",
        "visual tokens per image",
        f"time to first token, {shallowest(results)['layers']} of 32 layers",
        "KV cache per request",
        "concurrent requests",
    )
    whole = results["ttft"]["whole_model"][FICOCO_V.ttft]["speedup"]
    note = f"Extrapolated to all 32 layers, FiCoCo-V's first token comes {whole:.1f}x faster."
    return [*_table(header, rows), "", note]


def accuracy(results: Results) -> list[str]:
    """The README's table of what a budget costs on the demo model."""
    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in accuracies(results):
        by_method.setdefault(row["method"], {})[row["keep"]] = row
    budgets = sorted({keep for name in README_METHODS for keep in by_method[name]}, reverse=True)
    full = full_accuracy(results)
    return _table(
        ("method", f"all {PATCHES}", *map(str, budgets)),
        [
            [
                _TITLES.get(name, f"`{name}`"),
                f"{full:.1f}",
                *(f"{by_method[name][keep]['accuracy']:.1f}" for keep in budgets),
            ]
            for name in README_METHODS
        ],
    )


def ttft(results: Results) -> list[str]:
    """Time to first token, measured, predicted and extrapolated; KV cache; concurrent requests."""
    rows = []
    for row in ALL_ROWS:
        first = shallowest(results)["kinds"][row.ttft]
        whole = results["ttft"]["whole_model"].get(row.ttft)
        low, high = first["ttft_seconds_min"], first["ttft_seconds_max"]
        rows.append(
            [
                row.label,
                row.tokens,
                f"{first['ttft_seconds_median']:.2f} s ({low:.2f}-{high:.2f})",
                f"{first['speedup']:.2f}x ({first['predicted_speedup']:.2f}x)",
                f"{whole['speedup']:.2f}x ({whole['predicted_speedup']:.2f}x)" if whole else "",
                f"{row.kv_megabytes(results):.0f} MB",
                _concurrent(results, row),
            ]
        )
    layers = shallowest(results)["layers"]
    return _table(
        (
            "method",
            "visual tokens",
            f"first token, {layers} layers: median (min-max)",
            f"speed-up, {layers} layers (predicted from FLOPs)",
            "speed-up, 32 layers, extrapolated (predicted)",
            "KV cache per request",
            "concurrent requests",
        ),
        rows,
    )


def _concurrent(results: Results, row: Row) -> str:
    if row.concurrency is None:
        return ""
    counted = results["concurrency"]["kinds"][row.concurrency]
    return f"{counted['num_running']} ({counted['ratio']:.2f}x)"


def load(results: Results) -> list[str]:
    """Throughput of `make bench-load` at its largest load."""
    point = largest_load(results["load"])
    rows = []
    for row in results["load"]["summary"]:
        if row["point"] == point:
            median, low, high = (row[f"request_throughput{which}"] for which in ("", "_min", "_max"))
            first = f"{row['ttft_ms_p50'] / 1e3:.1f} s"
            rows.append([row["server"], f"{median:.2f} ({low:.2f}-{high:.2f})", first])
    return _table(("server", "requests/s: median (min-max)", "time to first token, median"), rows)


def machines(results: Results) -> list[str]:
    """Hardware and versions of every benchmark, once where they are the same."""
    described: dict[str, list[str]] = {}
    for name, result in results.items():
        environment = result["environment"]
        versions = ", ".join(f"{package} {number}" for package, number in environment["versions"].items())
        text = f"{environment['cores']} cores of an {environment['cpu']}, no GPU; {versions}"
        described.setdefault(text, []).append(f"`make bench-{name}`")
    return [f"{', '.join(commands)}: {text}." for text, commands in described.items()]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return table(header, rows, rule=" --- ")
