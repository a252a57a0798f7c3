"""Pictures of docs/accuracy.md and docs/benchmarks.md."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ficoco_vllm.benchmarks.accuracy.plots import budget_lines, token_axis
from ficoco_vllm.benchmarks.harness.model import PATCHES
from ficoco_vllm.benchmarks.harness.plots import COLOURS, as_svg
from ficoco_vllm.benchmarks.overview.tables import Results, accuracies, full_accuracy, shallowest

_PANEL_WIDTH, _HEIGHT = 4.2, 3.3


def pictures(results: Results) -> dict[str, str]:
    """SVG pictures by file name."""
    return {"accuracy.svg": _accuracy(results), "serving.svg": _serving(results)}


def _accuracy(results: Results) -> str:
    """Accuracy over the budget, a line for each method; methods of the tower and of the decoder apart."""
    rows = accuracies(results)
    panels = [
        (title, [row for row in rows if (row["site"] == "tower") == in_tower])
        for title, in_tower in (("in the tower", True), ("in the decoder, or both", False))
    ]

    def paint(figure: Figure) -> None:
        columns: Sequence[Axes] = figure.subplots(1, len(panels), sharey=True)
        for axes, (title, shown) in zip(columns, panels, strict=True):
            budget_lines(axes, shown, full_accuracy(results))
            token_axis(axes, [row["keep"] for row in shown], PATCHES)
            axes.set_title(title, fontsize=9)
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02))
        columns[0].set_ylabel("correct answers, %")

    return as_svg((_PANEL_WIDTH * len(panels), _HEIGHT), paint)


def _serving(results: Results) -> str:
    """Speed-up of the first token over FiCoCo-V's budget, and concurrent requests."""
    run = shallowest(results)
    timed = {
        f"{run['layers']} layers, measured": run["kinds"],
        "32 layers, extrapolated": results["ttft"]["whole_model"],
    }
    counted = results["concurrency"]["kinds"]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for colour, (label, kinds) in zip(COLOURS, timed.items(), strict=False):
            keeps = sorted(int(name.removeprefix("keep-")) for name in kinds if name.startswith("keep-"))
            for key, style, suffix in (
                ("speedup", "-", ""),
                ("predicted_speedup", ":", "; predicted from FLOPs"),
            ):
                values = [kinds[f"keep-{keep}"][key] for keep in keeps]
                left.plot(keeps, values, style, color=colour, marker="o", markersize=3, label=label + suffix)
            token_axis(left, keeps, PATCHES)
        left.set_title("speed-up of the first token, FiCoCo-V", fontsize=9)
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize=7)
        bars = right.barh(list(counted), [row["num_running"] for row in counted.values()], color=COLOURS[0])
        right.bar_label(bars, fontsize=8, padding=2)
        right.invert_yaxis()
        right.set_title("concurrent requests in the same KV memory", fontsize=9)

    return as_svg((2 * _PANEL_WIDTH, _HEIGHT), paint)
