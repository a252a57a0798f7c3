"""The README's pictures."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.harness.plots import COLOURS, as_svg
from ficoco_vllm.benchmarks.overview.settings import Measured, Results, Setting, collect, shallowest

_MARKERS, _STYLES = "osD^vP*X<>ph", ("-", "--", "-.")
_PANEL_WIDTH, _HEIGHT = 4.2, 3.3


def pictures(results: Results) -> dict[str, str]:
    """File name to SVG.

    Args:
        results: name of each benchmark to its committed JSON.
    """
    found = collect(results)
    return {"accuracy.svg": _accuracy(found), "serving.svg": _serving(found, results)}


def _accuracy(found: dict[Setting, Measured]) -> str:
    """Accuracy over the budget, a line a method; methods of the tower and of the decoder apart."""
    methods = [s.method for s, row in found.items() if row.accuracy and s.method]
    panels = [
        (title, [name for name in dict.fromkeys(methods) if (site_of(name) == "tower") == in_tower])
        for title, in_tower in (("in the tower", True), ("in the decoder, or both", False))
    ]
    shown = [(title, names) for title, names in panels if names]
    full = found[Setting()].accuracy

    def paint(figure: Figure) -> None:
        columns: Sequence[Axes] = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (title, names) in zip(columns, shown, strict=True):
            if full is not None:
                axes.axhline(full["accuracy"], color="#555", linewidth=1, linestyle=":", label="all tokens")
            for index, name in enumerate(names):
                points = sorted(
                    (s.keep, row.accuracy["accuracy"])
                    for s, row in found.items()
                    if s.method == name and row.accuracy and not s.schedule
                )
                axes.plot(
                    *zip(*points, strict=True),
                    label=name,
                    color=COLOURS[index % len(COLOURS)],
                    linestyle=_STYLES[index // len(COLOURS) % len(_STYLES)],
                    marker=_MARKERS[index % len(_MARKERS)],
                    markersize=4,
                    linewidth=2.2 if name.startswith("ficoco") else 1,
                )
            _tokens(axes, [s.keep for s, row in found.items() if s.method in names and row.accuracy])
            axes.set_title(title, fontsize=9)
            axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.02))
        columns[0].set_ylabel("questions answered right, %")

    return as_svg((_PANEL_WIDTH * len(shown), _HEIGHT), paint)


def _serving(found: dict[Setting, Measured], results: Results) -> str:
    """Speed-up of the first token over the budget, beside what FLOPs say; requests at once."""
    layers = shallowest(results["ttft"])["layers"]
    timed = [
        (f"{layers} layers, measured", {s.keep: row.ttft for s, row in found.items() if _timed(s, row)}),
        ("32 layers, extrapolated", {s.keep: row.ttft_whole for s, row in found.items() if _timed(s, row)}),
    ]
    fit = [(setting, row.concurrency) for setting, row in found.items() if row.concurrency]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for colour, (label, rows) in zip(COLOURS, timed, strict=False):
            keeps = sorted(keep for keep, row in rows.items() if row)
            for key, style, more in (("speedup", "-", ""), ("predicted_speedup", ":", "; FLOPs say")):
                values: list[Any] = [(rows[keep] or {})[key] for keep in keeps]
                left.plot(keeps, values, style, color=colour, marker="o", markersize=3, label=label + more)
        _tokens(left, [keep for _, rows in timed for keep in rows])
        left.set_title("first token, times as fast, FiCoCo-V", fontsize=9)
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize=7)
        names = [setting.label for setting, _ in fit]
        bars = right.barh(names, [row["num_running"] for _, row in fit], color=COLOURS[0])
        right.bar_label(bars, fontsize=8, padding=2)
        right.invert_yaxis()
        right.set_title("requests at once in the same KV memory", fontsize=9)

    return as_svg((2 * _PANEL_WIDTH, _HEIGHT), paint)


def _timed(setting: Setting, row: Measured) -> bool:
    return setting.method == "ficoco-v" and row.ttft is not None


def _tokens(axes: Axes, keeps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    ticks = sorted(set(keeps))
    axes.set_xticks(ticks, [str(keep) for keep in ticks])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens of 576")
