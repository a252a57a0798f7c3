"""Generated text: tables of the README and of docs/benchmarks.md, from the committed results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.accuracy.tables import of_table
from ficoco_vllm.benchmarks.accuracy.variants import FULL
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
    """A served configuration; its names in the results of `make bench-ttft` and, if counted, `bench-concurrency`."""

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
README_METHODS = {
    "ficoco-v": "FiCoCo-V",
    "best": "`best`",
    "ficoco-vl": "FiCoCo-VL",
    "ficoco-l": "FiCoCo-L",
    "pyramiddrop": "`pyramiddrop`",
}


def shallowest(results: Results) -> Mapping[str, Any]:
    """The run of `make bench-ttft` with the fewest decoder layers."""
    run: Mapping[str, Any] = min(results["ttft"]["runs"], key=lambda run: run["layers"])
    return run


def accuracies(results: Results) -> list[Mapping[str, Any]]:
    """Rows of both accuracy benchmarks that hold a method at a budget."""
    names = ("accuracy", "accuracy-decoder")
    return [row for name in names for row in of_table(results[name], "methods") if row["method"]]


def full_accuracy(results: Results) -> float:
    """Accuracy with all visual tokens, percent."""
    rows = of_table(results["accuracy"], "methods")
    return next(float(row["accuracy"]) for row in rows if row["label"] == FULL)


def savings(results: Results) -> list[str]:
    """The README's table of what a method saves."""
    run, stock = shallowest(results), STOCK.kv_megabytes(results)
    rows = []
    for row in README_ROWS:
        first, kv = run["kinds"][row.ttft], row.kv_megabytes(results)
        counted = results["concurrency"]["kinds"][row.concurrency]
        figures = (
            (f"{first['ttft_seconds_median']:.1f} s", f"{first['speedup']:.1f}x faster"),
            (f"{kv:.0f} MB", f"{stock / kv:.1f}x smaller"),
            (str(counted["num_running"]), f"{counted['ratio']:.1f}x"),
        )
        cells = [figure if row is STOCK else f"{figure} ({factor})" for figure, factor in figures]
        rows.append([row.label, row.tokens, *cells])
    first_token = f"time to first token, {run['layers']} of 32 layers"
    header = ("", "visual tokens per image", first_token, "KV cache per request", "concurrent requests")
    whole = results["ttft"]["whole_model"][FICOCO_V.ttft]["speedup"]
    note = f"Extrapolated to all 32 layers, FiCoCo-V's first token comes {whole:.1f}x faster."
    return [*_table(header, rows), "", note]


def accuracy(results: Results) -> list[str]:
    """The README's table of what a budget costs on the demo model."""
    figures = {(row["method"], row["keep"]): f"{row['accuracy']:.1f}" for row in accuracies(results)}
    budgets = sorted({keep for name, keep in figures if name in README_METHODS}, reverse=True)
    full = f"{full_accuracy(results):.1f}"
    return _table(
        ("method", f"all {PATCHES}", *map(str, budgets)),
        [[title, full, *(figures[name, keep] for keep in budgets)] for name, title in README_METHODS.items()],
    )


def advice(_: Results) -> list[str]:
    """The README's table of which method to take."""
    return as_markdown().splitlines()


def ttft(results: Results) -> list[str]:
    """Time to first token, measured, predicted and extrapolated; KV cache; concurrent requests."""
    run, whole, counts = shallowest(results), results["ttft"]["whole_model"], results["concurrency"]["kinds"]
    rows = []
    for row in ALL_ROWS:
        counted = counts.get(row.concurrency)
        concurrent = f"{counted['num_running']} ({counted['ratio']:.2f}x)" if counted else ""
        cells = [*_timed(run["kinds"][row.ttft], whole.get(row.ttft)), f"{row.kv_megabytes(results):.0f} MB"]
        rows.append([row.label, row.tokens, *cells, concurrent])
    return _table(
        (
            "method",
            "visual tokens",
            f"first token, {run['layers']} layers: median (min-max)",
            f"speed-up, {run['layers']} layers (predicted by the roofline)",
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
            if row := run["kinds"].get(kind):
                share = row["reduction_share_of_tower"]
                timed = _timed(row, whole.get(kind))
                rows.append([title, label, *timed, f"{share:.1%}" if share else ""])
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


def _timed(row: Mapping[str, Any], whole: Mapping[str, Any] | None) -> list[str]:
    """Time to first token, its speed-up, and the speed-up with all layers if that was extrapolated."""
    cells = [ranged(row, "ttft_seconds_").replace(" (", " s (")]
    for one in (row, whole):
        cells.append(f"{one['speedup']:.2f}x ({one['predicted_speedup']:.2f}x)" if one else "")
    return cells


def load(results: Results) -> list[str]:
    """Throughput of `make bench-load` at its largest load, which is the last of its summary."""
    summary, rows = results["load"]["summary"], []
    for row in summary:
        if row["point"] == summary[-1]["point"]:
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
