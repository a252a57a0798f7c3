"""Figures of matplotlib as SVG that is the same each time."""

from collections.abc import Callable
from io import StringIO

import matplotlib as mpl
from matplotlib.figure import Figure

# Told apart without colour vision too (Okabe and Ito's palette).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")


def as_svg(size_inches: tuple[float, float], paint: Callable[[Figure], None]) -> str:
    """Draw one figure.

    Args:
        size_inches: width and height.
        paint: fills the figure.

    Returns:
        The `<svg>` element.
    """
    # Text stays text, and the same figures give the same bytes.
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
