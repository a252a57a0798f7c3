"""Figures of matplotlib as SVG; the same figures give the same bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from itertools import cycle

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

# Distinguishable with colour blindness (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def as_svg(size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """Draw one figure.

    Args:
        size_inches: width and height.
        paint: fills the figure.

    Returns:
        The `<svg>` element.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ficoco", "font.size": 9}):
        figure = Figure(size_inches, layout="constrained")
        paint(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


@dataclass(frozen=True)
class Panel:
    """Lines over time.

    Attributes:
        lines: name of each line to its points (seconds, value).
    """

    title: str
    unit: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


_UNITS = {"s": "s", "Bps": "B/s", "flops": "FLOP/s", "reqps": "/s", "ops": "/s"}


def as_panels(panels: Sequence[Panel], num_columns: int, title: str) -> str:
    """Draw panels of lines in rows.

    Args:
        panels: in reading order.
        num_columns: panels of a row.
        title: of the whole figure.

    Returns:
        The `<svg>` element.
    """
    num_rows = -(-len(panels) // num_columns)

    def paint(figure: Figure) -> None:
        figure.suptitle(title, fontsize=9)
        for index, panel in enumerate(panels, 1):
            axes = figure.add_subplot(num_rows, num_columns, index)
            for (name, points), colour in zip(panel.lines.items(), cycle(COLOURS), strict=False):
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=name)
            axes.set_title(panel.title, fontsize=9, loc="left", weight="bold")
            axes.set_ylim(bottom=0)
            is_share = panel.unit == "percentunit"
            formatter = PercentFormatter(1.0) if is_share else EngFormatter(_UNITS.get(panel.unit, ""))
            axes.yaxis.set_major_formatter(formatter)
            axes.xaxis.set_major_formatter(EngFormatter("s"))
            axes.legend(
                frameon=False,
                fontsize=6,
                ncols=3,
                loc="upper center",
                bbox_to_anchor=(0.5, -0.1),
                columnspacing=1,
            )

    return as_svg((4.2 * num_columns, 2.4 * num_rows), paint)
