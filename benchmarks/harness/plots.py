"""Figures of matplotlib as SVG; the same figures give the same bytes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinguishable with colour blindness (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


@dataclass(frozen=True)
class Plot:
    """A picture of a report.

    Attributes:
        name: name of its file, without suffix.
        svg: the `<svg>` element, in the text colour of the page that it stands in.
    """

    name: str
    caption: str
    svg: str


def draw(name: str, caption: str, size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> Plot:
    """Draw one picture of a report, for a page with others, light or dark; screen readers read its caption."""
    svg = as_svg(size_inches, paint, transparent=True)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL).replace("#000000", "currentColor")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)  # unique in the page
    label = f'<svg role="img" aria-label="{escape(caption)}"'
    return Plot(name, caption, svg.replace("<svg", label, 1))


def legend_above(figure: Figure) -> None:
    """One legend for all axes, above them."""
    entries: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(
        entries.values(),
        entries,
        loc="outside upper left",
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=1.5,
    )


def from_zero(axes: Axes, axis: Literal["x", "y"] = "y") -> None:
    """Let an axis begin at zero, with room above the largest value; marks at the edges are not cut."""
    top = getattr(axes, f"get_{axis}lim")()[1]
    getattr(axes, f"set_{axis}lim")(0, top if top > 0 else 1)
    for line in axes.lines:
        line.set_clip_on(False)


def as_svg(
    size_inches: tuple[float, float], paint: Callable[[Figure], None], *, transparent: bool = False
) -> str:
    """Draw one figure as an `<svg>` element."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ficoco", "font.size": 9}):
        figure = Figure(size_inches, layout="constrained")
        paint(figure)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.set_axisbelow(True)
        text = StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=transparent)
    return text.getvalue()[text.getvalue().index("<svg") :]
