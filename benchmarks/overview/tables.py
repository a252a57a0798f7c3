"""Generated text: tables of the README and of docs/benchmarks.md, from the committed results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.harness.model import PATCHES
from ficoco_vllm.benchmarks.harness.pages import table
from ficoco_vllm.benchmarks.harness.rounds import ranged
from ficoco_vllm.reduction.advice import as_markdown

# Name of a benchmark to the content of its committed JSON.
Results = Mapping[str, Mapping[str, Any]]

# LLaVA-1.5-7B: keys and values of 32 layers, 4,096 wide, 2 bytes a value.
KV_BYTES_PER_TOKEN = 32 * 2 * 4096 * 2


@dataclass(frozen=True)
class Row:
    """A served configuration.

    Attributes:
        tokens: visual tokens of an image, as a buyer reads it.
        ttft: name in the results of `make bench-ttft`.
        concurrency: name in the results of `make bench-concurrency`, or None where it was not counted.
    """

    label: str
    tokens: str
    ttft: str
    concurrency: str | None = None

    def kv_megabytes(self, results: Results) -> float:
        """KV cache of one prompt in LLaVA-1.5-7B, fp16, decimal megabytes."""
        if self.concurrency is None:  # a method of the tower: every layer holds the whole prompt
            tokens = shallowest(results)["kinds"][self.ttft]["num_prompt_tokens"]
        else:
            tokens = results["concurrency"]["kinds"][self.concurrency]["mean_kv_tokens"]
        return float(tokens * KV_BYTES_PER_TOKEN / 1e6)


STOCK = Row("stock vLLM", str(PATCHES), "stock", "stock")
FICOCO_V = Row("FiCoCo-V, in the vision encoder", "64", "keep-64", "V 64")
FICOCO_VL = Row("FiCoCo-VL, in both", "64 in the last layers", "ficoco-vl", "VL 64")
FICOCO_L = Row("FiCoCo-L, in the decoder", "64 in the last layers", "ficoco-l", "L 64")
README_ROWS = (STOCK, FICOCO_V, FICOCO_VL, FICOCO_L)
ALL_ROWS = (
    STOCK,
    Row("FiCoCo-V, nothing removed", str(PATCHES), "keep-576"),
    Row("FiCoCo-V", "192", "keep-192"),
    Row("FiCoCo-V", "128", "keep-128"),
    FICOCO_V,
    Row("at random, behind the vision encoder", "64", "random"),
    FICOCO_VL,
    FICOCO_L,
    Row("FiCoCo-L, one-shot", "64 in the last layers", "ficoco-l-one-shot", "L 64 one-shot"),
)
# Results of `make bench-ttft` with other families: name to model.
FAMILIES = {"ttft-internvl3-8b": "InternVL3-8B", "ttft-qwen3-vl-8b": "Qwen3-VL-8B"}
_FAMILY_ROWS = {
    "stock": "stock vLLM",
    "keep-64": "64, FiCoCo-V",
    "keep-28": "28, FiCoCo-V",
    "random": "28, at random behind the tower",
    "downscale": "at most 28, of a smaller image",
    "ficoco-vl": "28 in the last layers, FiCoCo-VL",
    "ficoco-l": "28 in the last layers, FiCoCo-L",
    "ficoco-l-one-shot": "28 in the last layers, FiCoCo-L, one-shot",
}
# Methods in the README's table of accuracy: ours, and the two that lose least in tower and decoder.
README_METHODS = ("ficoco-v", "best", "ficoco-vl", "ficoco-l", "pyramiddrop")


def shallowest(results: Results) -> Mapping[str, Any]:
    """The run of `make bench-ttft` with the fewest decoder layers."""
    run: Mapping[str, Any] = min(results["ttft"]["runs"], key=lambda run: run["layers"])
    return run


def accuracies(results: Results) -> list[Mapping[str, Any]]:
    """Rows of both accuracy benchmarks that hold a method at a budget."""
    return [
        row
        for name in ("accuracy", "accuracy-decoder")
        for row in results[name]["rows"]
        if row["table"] == "methods" and row["method"]
    ]


def full_accuracy(results: Results) -> float:
    """Accuracy with all visual tokens, percent."""
    return next(
        float(row["accuracy"])
        for row in results["accuracy"]["rows"]
        if row["table"] == "methods" and row["label"] == "full"
    )


def largest_load(result: Mapping[str, Any]) -> str:
    """Name of the point of a load test with the most open requests."""
    traffic = {row["point"]: row["traffic"] for row in result["rows"]}
    return str(
        max(traffic, key=lambda name: (traffic[name]["rate"] is None, traffic[name]["concurrency"] or 0))
    )


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
        "families": families(results),
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
        rows.append(
            [
                row.label,
                row.tokens,
                ranged(first, "ttft_seconds_").replace(" (", " s ("),
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
            f"speed-up, {layers} layers (predicted by the roofline)",
            "speed-up, 32 layers, extrapolated (predicted)",
            "KV cache per request",
            "concurrent requests",
        ),
        rows,
    )


def families(results: Results) -> list[str]:
    """Time to first token of other families, in the run whose decoder is deepest."""
    rows = []
    for name, title in FAMILIES.items():
        run, whole = max(results[name]["runs"], key=lambda run: run["layers"]), results[name]["whole_model"]
        for kind, label in _FAMILY_ROWS.items():
            if kind not in run["kinds"]:
                continue
            row, all_layers = run["kinds"][kind], whole.get(kind)
            rows.append(
                [
                    title,
                    label,
                    ranged(row, "ttft_seconds_").replace(" (", " s ("),
                    f"{row['speedup']:.2f}x ({row['predicted_speedup']:.2f}x)",
                    f"{all_layers['speedup']:.2f}x ({all_layers['predicted_speedup']:.2f}x)"
                    if all_layers
                    else "",
                    f"{row['reduction_share_of_tower']:.1%}" if row["reduction_share_of_tower"] else "",
                ]
            )
    return _table(
        (
            "model",
            "256 visual tokens become",
            "first token, 8 layers: median (min-max)",
            "speed-up, 8 layers (predicted by the roofline)",
            "speed-up, all layers, extrapolated (predicted)",
            "reduction's share of the tower",
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
        described.setdefault(text, []).append(_command(name))
    return [f"{', '.join(commands)}: {text}." for text, commands in described.items()]


def _command(name: str) -> str:
    size = name.removeprefix("ttft-")
    return f"`make bench-{name}`" if size == name else f'`make bench-ttft ARGS="--model-size {size}"`'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return table(header, rows, rule=" --- ")
