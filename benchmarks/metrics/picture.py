"""The dashboard's panels as a picture: Prometheus evaluates their queries over a run of the demo model.

Three phases of equal load on a small KV cache: requests keep all 576 tokens, the server's 64, and 32 by another method.

    python -m ficoco_vllm.benchmarks.metrics.picture [--out docs/images/dashboard.svg]
"""

import argparse
import asyncio
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import chat, data_url
from ficoco_vllm.benchmarks.harness.plots import Panel, as_panels
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.metrics.prometheus import DASHBOARD, Prometheus, filled_in, scrape

OUT = Path("docs/images/dashboard.svg")
PHASES: tuple[dict[str, Any], ...] = (
    {"ficoco_keep": 576},
    {},
    {"ficoco_keep": 32, "ficoco_method": "topk-cls"},
)
CONCURRENCY, NUM_TOKENS, STEP_SECONDS, WINDOW_SECONDS = 24, 96, 2, 12
# Some 126 blocks of 128 tokens: 18 of the 24 requests that keep everything fit.
SERVE = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64", "--trust-request-mm-kwargs")
KV_BYTES = 126 * 128 * 8192
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


def main() -> int:
    """Run the load, evaluate the queries, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
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
            panels, now = _panels(prometheus, start, end), _now(prometheus, end)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    title = "ficoco-vllm dashboard: all 576 tokens, then ficoco-v with 64, then top-k by [CLS] with 32, at equal load"
    args.out.write_text(as_panels(panels, 3, f"{title}\n{now}"))
    return 0


async def _phase(url: str, kwargs: Mapping[str, Any], seconds: float) -> None:
    """`CONCURRENCY` clients, each with one request after the other."""
    end = time.monotonic() + seconds
    async with httpx.AsyncClient(
        base_url=url, timeout=300, limits=httpx.Limits(max_connections=64)
    ) as client:

        async def ask(index: int) -> None:
            shade = 0
            while time.monotonic() < end:
                shade += 1
                image = data_url(Image.new("RGB", (64, 64), (index * 8, shade % 256, 77)))
                more = {"max_tokens": NUM_TOKENS, "ignore_eos": True} | (
                    {"mm_processor_kwargs": kwargs} if kwargs else {}
                )
                body = chat("ficoco-demo", "is there a red sign?", [image], **more)
                answer = await client.post("/v1/chat/completions", json=body)
                if answer.is_error:
                    raise RuntimeError(answer.text)

        await asyncio.gather(*(ask(index) for index in range(CONCURRENCY)))


def _shown() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return panels


def _now(prometheus: Prometheus, end: float) -> str:
    """The dashboard's row of single values."""
    words = []
    for panel in _shown():
        if panel["type"] == "stat":
            (value,) = prometheus.query(filled_in(panel["targets"][0]["expr"], WINDOW_SECONDS), end).values()
            form = {"percentunit": "{:.0%}", "s": "{:.1f} s"}.get(
                panel["fieldConfig"]["defaults"]["unit"], "{:.0f}"
            )
            words.append(f"{panel['title']}: {form.format(value)}")
    return "at the end: " + "; ".join(words)


def _panels(prometheus: Prometheus, start: float, end: float) -> list[Panel]:
    shown = {panel["title"]: panel for panel in _shown()}
    panels = []
    for title in PANELS:
        lines: dict[str, list[tuple[float, float]]] = {}
        for target in shown[title]["targets"]:
            for labels, points in _range(prometheus, target["expr"], start, end):
                lines[_legend(target["legendFormat"], labels)] = points
        panels.append(Panel(title, shown[title]["fieldConfig"]["defaults"]["unit"], lines))
    return panels


def _legend(form: str, labels: Mapping[str, str]) -> str:
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), form)


def _range(
    prometheus: Prometheus, expression: str, start: float, end: float
) -> list[tuple[dict[str, str], list[tuple[float, float]]]]:
    """Labels and points of each series; gaps (no traffic of a kind) are left out."""
    query = filled_in(expression, WINDOW_SECONDS)
    result = prometheus.ask("query_range", query=query, start=start, end=end, step=STEP_SECONDS)
    series = [
        (row["metric"], [(float(t) - start, float(v)) for t, v in row["values"] if v != "NaN"])
        for row in result
    ]
    return [(labels, points) for labels, points in series if points]


if __name__ == "__main__":
    sys.exit(main())
