"""Pictures of a load test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ficoco_vllm.benchmarks.harness.plots import COLOURS, Plot, draw, from_zero, legend_above

_SIZE_INCHES = (4.8, 3.2)
# Latencies whose 99th percentile exceeds the median by this factor get a logarithmic scale.
_WIDE = 20
Rows = Sequence[Mapping[str, Any]]
Colours = Mapping[str, str]


def plots(rows: Rows, summary: Rows) -> list[Plot]:
    """Every picture that has something to show, from the rows of a run and their medians."""
    servers = list(dict.fromkeys(row["server"] for row in summary))
    points = list(dict.fromkeys(row["point"] for row in summary))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(servers)}

    def picture(name: str, caption: str, paint: Callable[..., None], *arguments: Any) -> Plot:
        def fill(figure: Figure) -> None:
            axes = figure.add_subplot()
            paint(axes, *arguments, colours)
            if axes.get_yscale() == "linear":
                from_zero(axes)
            legend_above(figure)

        return draw(name, caption, _SIZE_INCHES, fill)

    pictures = [
        picture("throughput", "Requests per second, smallest to largest round", _throughput, summary),
        picture("ttft", "Time to first token", _latency, "ttft", "s", 1e-3, summary),
        picture("itl", "Time between tokens", _latency, "itl", "ms", 1.0, summary),
    ]
    if len(points) > 1:
        caption = "Time to first token over throughput"
        pictures.append(picture("ttft-by-throughput", caption, _curve, summary))
    for index, point in enumerate(points):
        mine = [row for row in rows if row["point"] == point]
        if any(row["samples"] for row in mine):
            pictures.append(picture(f"kv-cache-{index}", f"KV cache in use, {point}", _cache, mine))
    return pictures


def _throughput(axes: Axes, summary: Rows, colours: Colours) -> None:
    names = [f"request_throughput{end}" for end in ("", "_min", "_max")]
    for places, (median, low, high), look in _beside(axes, summary, names, colours):
        spread = np.stack((median - low, high - median)).tolist()
        bars = axes.bar(places, median, 0.7 / len(colours), yerr=spread, **look)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.margins(y=0.12)
    axes.set_ylabel("requests/s")


def _curve(axes: Axes, summary: Rows, colours: Colours) -> None:
    for server, colour in colours.items():
        mine = sorted(
            (row["request_throughput"], row["ttft_ms_p50"] / 1e3)
            for row in summary
            if row["server"] == server
        )
        axes.plot(*zip(*mine, strict=True), marker="o", color=colour, label=server)
    axes.set_xlabel("requests/s")
    axes.set_ylabel("TTFT p50, s")
    from_zero(axes, "x")


def _latency(axes: Axes, name: str, unit: str, factor: float, summary: Rows, colours: Colours) -> None:
    names = [f"{name}_ms_p{p}" for p in (50, 90, 99)]
    for places, percentiles, look in _beside(axes, summary, names, colours):
        low, middle, high = percentiles * factor
        axes.vlines(places, low, high, color=look["color"], linewidth=1)
        axes.vlines(places, low, middle, color=look["color"], linewidth=5)
        axes.plot(places, low, "o", **look)
    if any(row[names[-1]] > _WIDE * row[names[0]] > 0 for row in summary):
        axes.set_yscale("log")
    axes.set_ylabel(f"{name.upper()}, {unit}")


def _cache(axes: Axes, rows: Rows, colours: Colours) -> None:
    for row in rows:
        axes.plot(
            [sample["seconds"] for sample in row["samples"]],
            [100 * sample["kv_cache_usage"] for sample in row["samples"]],
            color=colours[row["server"]],
            linewidth=1.2,
            label=row["server"],
        )
    axes.set_xlabel("seconds")
    axes.set_ylabel("KV cache in use, %")


def _beside(
    axes: Axes, summary: Rows, names: Sequence[str], colours: Colours
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64], dict[str, Any]]]:
    """Each server's places (points,), figures (names, points), colour and label: servers side by side at each point."""
    points = list(dict.fromkeys(row["point"] for row in summary))
    axes.set_xticks(range(len(points)), points)
    axes.set_xlim(-0.5, len(points) - 0.5)
    for index, (server, colour) in enumerate(colours.items()):
        mine = [row for row in summary if row["server"] == server]
        places = (
            np.array([points.index(row["point"]) for row in mine]) + (index + 0.5) * 0.8 / len(colours) - 0.4
        )
        figures = np.array([[row[name] for row in mine] for name in names])
        yield places, figures, {"color": colour, "label": server}
