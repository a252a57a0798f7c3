"""Pictures of an accuracy run."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ficoco_vllm.benchmarks.harness.plots import COLOURS, Plot, draw, legend_above

_MARKERS, _STYLES = "osD^vP*X<>ph", ("-", "--", "-.")
_WIDTH = 4.8
Rows = Sequence[Mapping[str, Any]]


def budget_lines(axes: Axes, rows: Rows, full: float | None) -> None:
    """Draw accuracy over the budget, a line for each method, and the accuracy `full` with all visual tokens."""
    if full is not None:
        axes.axhline(full, color="#555", linewidth=1, linestyle=":", label="all tokens")
    for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = sorted((row["keep"], row["accuracy"]) for row in rows if row["method"] == name)
        axes.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLOURS[index % len(COLOURS)],
            linestyle=_STYLES[index // len(COLOURS) % len(_STYLES)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=2.2 if name.startswith("ficoco") else 1,
        )


def token_axis(axes: Axes, keeps: Sequence[int], num_tokens: int) -> None:
    """Label the horizontal axis with budgets, out of the visual tokens of an unreduced image."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(keeps))
    axes.set_xticks(ticks, [str(keep) for keep in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"visual tokens of {num_tokens}")


def plots(rows: Rows, num_tokens: int) -> list[Plot]:
    """Accuracy over the budget, and the change at the smallest budget, from rows of the table of methods."""
    reduced = [row for row in rows if row["keep"] is not None]
    if not reduced:
        return []
    full = next((row["accuracy"] for row in rows if row["label"] == "full"), None)
    smallest = min(row["keep"] for row in reduced)
    compared = [row for row in reduced if row["keep"] == smallest and "against_full" in row]

    def lines(figure: Figure) -> None:
        axes = figure.add_subplot()
        budget_lines(axes, reduced, full)
        token_axis(axes, [row["keep"] for row in reduced], num_tokens)
        axes.set_ylabel("correct answers, %")
        legend_above(figure)

    def changes(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row in sorted(compared, key=lambda row: row["against_full"]["change"]):
            change, (low, high) = row["against_full"]["change"], row["against_full"]["interval"]
            axes.plot([low, high], [row["method"]] * 2, color=COLOURS[0], linewidth=2)
            axes.plot([change], [row["method"]], "o", color=COLOURS[0])
        axes.axvline(0, color="#555", linewidth=1, linestyle=":")
        axes.set_xlabel("percentage points, with 95% interval")

    num_methods = len({row["method"] for row in reduced})
    drawn = [draw("accuracy", "Correct answers by budget", (_WIDTH, 2.8 + 0.06 * num_methods), lines)]
    if compared:
        caption = f"Change against all visual tokens, {smallest} tokens"
        drawn.append(draw("change", caption, (_WIDTH, 1.4 + 0.17 * num_methods), changes))
    return drawn
