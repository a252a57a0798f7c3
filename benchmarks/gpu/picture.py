"""The serving step as a picture: each row's gain over stock vLLM, measured and predicted."""

from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure

from ficoco_vllm.benchmarks.harness.plots import COLOURS, as_svg


def picture(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """An SVG of two panels, time to first token and requests a second.

    Args:
        rows: of the serving step, stock vLLM among them.
    """

    def paint(figure: Figure) -> None:
        stock = rows["stock"]
        others = [name for name in rows if name != "stock"]
        gains: Mapping[str, tuple[Callable[[Any], float], Callable[[Any], float]]] = {
            "first token": (
                lambda row: 1 / row["ttft_seconds"]["median"],
                lambda row: 1 / row["predicted"]["ttft_seconds"],
            ),
            "requests a second": (
                lambda row: row["requests_per_second"],
                lambda row: row["predicted"]["requests_per_second"],
            ),
        }
        for number, (title, ways) in enumerate(gains.items(), 1):
            axes = figure.add_subplot(1, 2, number)
            for place, (way, label) in enumerate(zip(ways, ("measured", "roofline"), strict=True)):
                values = [way(rows[name]) / way(stock) for name in others]
                where = [index + 0.4 * place for index in range(len(others))]
                drawn = axes.barh(where, values, height=0.4, color=COLOURS[place], label=label)
                axes.bar_label(drawn, [f"{value:.2f}x" for value in values], padding=3)
            axes.set_title(f"{title}, over stock vLLM", loc="left")
            axes.set_yticks([index + 0.2 for index in range(len(others))], others)
            axes.margins(x=0.2)
            axes.invert_yaxis()
        axes.legend(frameon=False, loc="lower right")

    return as_svg((9, 0.8 + 0.5 * len(rows)), paint)
