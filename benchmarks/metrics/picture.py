"""The dashboard's panels as a picture: Prometheus evaluates their queries over a run of the demo model.

Three phases of equal load on a small KV cache: requests keep all 576 tokens, the server's 64, and 32 by another method.

    python -m ficoco_vllm.benchmarks.metrics.picture [--out docs/images/dashboard.svg]
"""

import asyncio
import math
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from openai import AsyncOpenAI
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import chat, data_url
from ficoco_vllm.benchmarks.harness.plots import COLOURS, as_svg
from ficoco_vllm.benchmarks.harness.results import make_parser
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.metrics.prometheus import Prometheus, filled_in, panels, scrape

PHASES: tuple[dict[str, Any], ...] = (
    {"ficoco_keep": 576},
    {},
    {"ficoco_keep": 32, "ficoco_method": "topk-cls"},
)
CONCURRENCY, NUM_TOKENS, STEP_SECONDS, WINDOW_SECONDS = 24, 96, 2, 12
# Some 126 blocks of 128 tokens: 18 of the 24 requests that keep everything fit.
SERVE = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64", "--trust-request-mm-kwargs")
KV_BYTES = 126 * 128 * 8192
TITLE = (
    "ficoco-vllm dashboard: all 576 tokens, then ficoco-v with 64, then top-k by [CLS] with 32, at equal load"
)
PANELS = (
    "Visual tokens removed",
    "Visual tokens",
    "KV cache not written",
    "KV cache in use",
    "KV blocks",
    "Running and waiting",
    "Time to first token",
    "Inter-token latency",
    "Budget of an image",
)
NUM_COLUMNS, PANEL_INCHES = 3, (4.2, 2.4)
_UNITS = {"s": "s", "Bps": "B/s", "flops": "FLOP/s", "reqps": "/s", "ops": "/s"}
_STATS = {"percentunit": "{:.0%}", "s": "{:.1f} s"}
Lines = Mapping[str, list[tuple[float, float]]]


def main() -> int:
    """Run the load, evaluate the queries, draw."""
    parser = make_parser(__doc__, "dashboard", seed=False)
    parser.set_defaults(out=Path("docs/images/dashboard.svg"))
    parser.add_argument("--seconds", type=int, default=40, help="of a phase")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with (
            serving([*SERVE, "--kv-cache-memory-bytes", str(KV_BYTES)], folder / "log") as server,
            scrape(folder, server.url.removeprefix("http://")) as prometheus,
        ):
            asyncio.run(_phase(server.url, PHASES[0], 5))  # images are decoded, code is warm
            time.sleep(WINDOW_SECONDS)
            start = time.time()
            for phase in PHASES:
                asyncio.run(_phase(server.url, phase, args.seconds))
            end = time.time()
            shown = {panel["title"]: panel for panel in panels()}
            charts = [(shown[title], _lines(prometheus, shown[title], start, end)) for title in PANELS]
            values = _single_values(prometheus, end)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(_drawn(charts, f"{TITLE}\nat the end: {values}"))
    return 0


async def _phase(url: str, kwargs: Mapping[str, Any], seconds: float) -> None:
    """`CONCURRENCY` clients, each with one request after the other."""
    end = time.monotonic() + seconds
    extra = {"ignore_eos": True} | ({"mm_processor_kwargs": kwargs} if kwargs else {})
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def ask(index: int) -> None:
            shade = 0
            while time.monotonic() < end:
                shade += 1
                image = data_url(Image.new("RGB", (64, 64), (index * 8, shade % 256, 77)))
                body = chat("ficoco-demo", "is there a red sign?", [image], max_tokens=NUM_TOKENS)
                await client.chat.completions.create(**body, extra_body=extra)

        await asyncio.gather(*(ask(index) for index in range(CONCURRENCY)))


def _unit(panel: Mapping[str, Any]) -> str:
    return str(panel["fieldConfig"]["defaults"]["unit"])


def _single_values(prometheus: Prometheus, end: float) -> str:
    """The dashboard's row of single values."""
    words = []
    for panel in panels():
        if panel["type"] == "stat":
            (value,) = prometheus.query(filled_in(panel["targets"][0]["expr"], WINDOW_SECONDS), end).values()
            words.append(f"{panel['title']}: {_STATS.get(_unit(panel), '{:.0f}').format(value)}")
    return "; ".join(words)


def _lines(prometheus: Prometheus, panel: Mapping[str, Any], start: float, end: float) -> Lines:
    """Name of each series of a panel to its points (seconds, value); times without traffic are left out."""
    lines = {}
    for target in panel["targets"]:
        query = filled_in(target["expr"], WINDOW_SECONDS)
        for row in prometheus.ask("query_range", query=query, start=start, end=end, step=STEP_SECONDS):
            if points := [(float(t) - start, float(v)) for t, v in row["values"] if v != "NaN"]:
                lines[_legend(target["legendFormat"], row["metric"])] = points
    return lines


def _legend(template: str, labels: Mapping[str, str]) -> str:
    """Grafana's name of a series."""
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), template)


def _drawn(charts: Sequence[tuple[Mapping[str, Any], Lines]], title: str) -> str:
    num_rows = math.ceil(len(charts) / NUM_COLUMNS)

    def paint(figure: Figure) -> None:
        figure.suptitle(title, fontsize=9)
        for index, (panel, series) in enumerate(charts, 1):
            axes = figure.add_subplot(num_rows, NUM_COLUMNS, index)
            for (label, points), colour in zip(series.items(), cycle(COLOURS), strict=False):
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4, label=label)
            axes.set_title(panel["title"], fontsize=9, loc="left", weight="bold")
            axes.set_ylim(bottom=0)
            unit = _unit(panel)
            form = PercentFormatter(1.0) if unit == "percentunit" else EngFormatter(_UNITS.get(unit, ""))
            axes.yaxis.set_major_formatter(form)
            axes.xaxis.set_major_formatter(EngFormatter("s"))
            below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
            axes.legend(frameon=False, fontsize=6, ncols=3, columnspacing=1, **below)

    width, height = PANEL_INCHES
    return as_svg((width * NUM_COLUMNS, height * num_rows), paint)


if __name__ == "__main__":
    sys.exit(main())
