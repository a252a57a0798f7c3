"""Pictures of a load test, as SVG."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ficoco_vllm.benchmarks.harness.plots import COLOURS, as_svg

_SIZE_INCHES = (7.0, 3.6)


def draw(rows: Sequence[Mapping[str, Any]], summary: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every picture of the report.

    Returns:
        Title and SVG of each.
    """
    servers = list(dict.fromkeys(row["server"] for row in summary))
    points = list(dict.fromkeys(row["point"] for row in summary))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(servers)}
    pictures = [
        ("Throughput over time to first token", _svg(_throughput, summary, colours)),
        ("Time to first token, p50 to p99", _svg(_latency, summary, colours, points, "ttft", "s", 1e-3)),
        ("Time between tokens, p50 to p99", _svg(_latency, summary, colours, points, "itl", "ms", 1.0)),
    ]
    if any(row["samples"] for row in rows):
        pictures += [
            ("Concurrent requests, at most", _svg(_bars, summary, colours, points, "num_running_max")),
            ("Preemptions", _svg(_bars, summary, colours, points, "num_preemptions")),
        ]
        pictures += [(f"KV cache in use, {point}", _svg(_cache, rows, colours, point)) for point in points]
    return pictures


def _svg(paint: Any, *arguments: Any) -> str:
    def fill(figure: Figure) -> None:
        axes = figure.add_subplot()
        paint(axes, *arguments)
        axes.legend(frameon=False, fontsize=8)

    return as_svg(_SIZE_INCHES, fill)


def _throughput(axes: Axes, summary: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
    for server, colour in colours.items():
        mine = sorted(
            (row for row in summary if row["server"] == server), key=lambda row: row["request_throughput"]
        )
        axes.plot(
            [row["request_throughput"] for row in mine],
            [row["ttft_ms_p50"] / 1000 for row in mine],
            marker="o",
            color=colour,
            label=server,
        )
    axes.set_xlabel("requests/s")
    axes.set_ylabel("TTFT p50, s")
    axes.set_ylim(bottom=0)


def _latency(
    axes: Axes,
    summary: Sequence[Mapping[str, Any]],
    colours: Mapping[str, str],
    points: Sequence[str],
    name: str,
    unit: str,
    factor: float,
) -> None:
    """From the median up to the 99th percentile, with a mark at the 90th."""
    for row, place, bar in _placed(summary, colours, points):
        low, middle, high = (row[f"{name}_ms_p{p}"] * factor for p in (50, 90, 99))
        axes.bar(place, high - low, bottom=low, **bar)
        half = bar["width"] / 2
        axes.plot([place - half, place + half], [middle, middle], color="white", linewidth=1)
    _label(axes, points, f"{name.upper()}, {unit}")


def _bars(
    axes: Axes,
    summary: Sequence[Mapping[str, Any]],
    colours: Mapping[str, str],
    points: Sequence[str],
    figure: str,
) -> None:
    for row, place, bar in _placed(summary, colours, points):
        axes.bar(place, row[figure] or 0, **bar)
    _label(axes, points, "")


def _cache(axes: Axes, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str], point: str) -> None:
    seen: set[str] = set()
    for row in (row for row in rows if row["point"] == point):
        server = row["server"]
        axes.plot(
            [sample["seconds"] for sample in row["samples"]],
            [100 * sample["kv_cache_usage"] for sample in row["samples"]],
            color=colours[server],
            linewidth=1.2,
            label=None if server in seen else server,
        )
        seen.add(server)
    axes.set_xlabel("seconds")
    axes.set_ylabel("KV cache in use, %")
    axes.set_ylim(bottom=0)


def _placed(
    summary: Sequence[Mapping[str, Any]], colours: Mapping[str, str], points: Sequence[str]
) -> Iterator[tuple[Mapping[str, Any], float, dict[str, Any]]]:
    """Rows with the place and looks of their bars: points side by side, servers within them."""
    servers, width = list(colours), 0.8 / len(colours)
    for row in summary:
        server, point = row["server"], row["point"]
        place = points.index(point) + (servers.index(server) - (len(servers) - 1) / 2) * width
        label = server if point == points[0] else None
        yield row, place, {"width": 0.9 * width, "color": colours[server], "label": label}


def _label(axes: Axes, points: Sequence[str], unit: str) -> None:
    axes.set_xticks(range(len(points)), points)
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
