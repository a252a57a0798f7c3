"""Pictures of a load test."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    if any(row["num_preemptions"] for row in summary):
        pictures.append(picture("preemptions", "Preemptions", _bars, "num_preemptions", "", summary))
    for index, point in enumerate(points):
        mine = [row for row in rows if row["point"] == point]
        if any(row["samples"] for row in mine):
            pictures.append(picture(f"kv-cache-{index}", f"KV cache in use, {point}", _cache, mine))
    return pictures


def _throughput(axes: Axes, summary: Rows, colours: Colours) -> None:
    name = "request_throughput"
    _bars(axes, name, "requests/s", summary, colours)
    for row, place, _ in _placed(summary, colours):
        axes.plot([place, place], [row[f"{name}_min"], row[f"{name}_max"]], color="#000000", linewidth=1)
        axes.annotate(
            f"{row[name]:.2f}",
            (place, row[f"{name}_max"]),
            (0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.margins(y=0.12)


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
    for row, place, colour in _placed(summary, colours):
        low, middle, high = (row[f"{name}_ms_p{p}"] * factor for p in (50, 90, 99))
        axes.plot([place, place], [low, high], color=colour, linewidth=1)
        axes.plot([place, place], [low, middle], color=colour, linewidth=5, solid_capstyle="butt")
        axes.plot([place], [low], "o", color=colour, label=row["server"])
    if any(row[f"{name}_ms_p99"] > _WIDE * row[f"{name}_ms_p50"] > 0 for row in summary):
        axes.set_yscale("log")
    _label(axes, summary, f"{name.upper()}, {unit}")


def _bars(axes: Axes, figure: str, unit: str, summary: Rows, colours: Colours) -> None:
    for row, place, colour in _placed(summary, colours):
        axes.bar(place, row[figure] or 0, 0.7 / len(colours), color=colour, label=row["server"])
    _label(axes, summary, unit)


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


def _placed(summary: Rows, colours: Colours) -> Iterator[tuple[Mapping[str, Any], float, str]]:
    """Rows with their place and colour: points side by side, servers within them."""
    points, servers = list(dict.fromkeys(row["point"] for row in summary)), list(colours)
    for row in summary:
        offset = (servers.index(row["server"]) - (len(servers) - 1) / 2) * 0.8 / len(servers)
        yield row, points.index(row["point"]) + offset, colours[row["server"]]


def _label(axes: Axes, summary: Rows, unit: str) -> None:
    points = list(dict.fromkeys(row["point"] for row in summary))
    axes.set_xticks(range(len(points)), points)
    axes.set_xlim(-0.5, len(points) - 0.5)
    axes.set_ylabel(unit)
