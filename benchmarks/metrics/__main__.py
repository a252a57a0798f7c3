"""`make bench-metrics`: throughput of a server with our metrics against one without, in one interleaved run.

Two servers of the demo model stand beside each other, alike but for `--ficoco-no-metrics`, and are loaded at the same
time by as many clients each, so that whatever else the machine does meets both alike. Compared are slices of the run:
requests answered, and CPU time of all of a server's processes for each request answered.
"""

import argparse
import asyncio
import json
import sys
import tempfile
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev

import httpx
import psutil
from PIL import Image

from benchmarks.bars import Bar, environment, report
from tests.support.server import Server, data_url, message, serve

RESULTS = Path(__file__).parent.parent / "results" / "metrics.json"
LIMIT_PERCENT = 1.0
# A run whose noise is larger says nothing.
NOISE_PERCENT = 5.0
KINDS = {"on": (), "off": ("--ficoco-no-metrics",)}
SERVE = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64")
NUM_TOKENS = 16
# Two-sided 95% of the normal distribution; there are many slices.
CONFIDENCE = 1.96


def main() -> int:
    """Run the benchmark, write its JSON, print its bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--slices", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=10, help="of a slice")
    parser.add_argument("--concurrency", type=int, default=8, help="clients of each server")
    args = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            kind: stack.enter_context(serve(folder / kind, *SERVE, *options))
            for kind, options in KINDS.items()
        }
        slices = asyncio.run(_run(servers, args.slices, args.seconds, args.concurrency))
    figures = {
        "throughput": _overhead([entry["off"]["answered"] / entry["on"]["answered"] for entry in slices]),
        "cpu_seconds_per_request": _overhead([_cost(entry["on"]) / _cost(entry["off"]) for entry in slices]),
    }
    load = {"concurrency": args.concurrency, "tokens": NUM_TOKENS, "slice_seconds": args.seconds}
    result = {"environment": environment(), "load": load, "overhead": figures, "slices": slices}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, figure in figures.items():
        print(f"{name}: overhead {figure['percent']:+.2f}% +- {figure['noise_percent']:.2f}%")
    bars = []
    for name, figure in figures.items():
        beyond = max(0.0, figure["percent"] - figure["noise_percent"])  # within the noise there is none
        bars.append(
            Bar(f"metrics-{name}-overhead-percent-beyond-noise", beyond, LIMIT_PERCENT, at_least=False)
        )
        bars.append(
            Bar(f"metrics-{name}-noise-percent", figure["noise_percent"], NOISE_PERCENT, at_least=False)
        )
    return report(bars)


def _overhead(ratios: list[float]) -> dict[str, float]:
    """Mean of with against without in percent, and half of its 95% interval."""
    percents = [100 * (ratio - 1) for ratio in ratios]
    return {"percent": fmean(percents), "noise_percent": CONFIDENCE * stdev(percents) / sqrt(len(percents))}


def _cost(entry: dict[str, float]) -> float:
    return entry["cpu_seconds"] / entry["answered"]


async def _run(
    servers: dict[str, Server], num_slices: int, seconds: float, concurrency: int
) -> list[dict[str, dict[str, float]]]:
    """Load all servers at once; after a warm-up, note what each did in each slice."""
    answered = dict.fromkeys(servers, 0)
    processes = {kind: _processes(server) for kind, server in servers.items()}
    clients = [
        asyncio.create_task(_client(kind, server, index, answered))
        for index in range(concurrency)
        for kind, server in servers.items()
    ]
    slices: list[dict[str, dict[str, float]]] = []
    await asyncio.sleep(seconds)  # warm-up: every image was seen
    for kind, server in servers.items():
        counts = "ficoco:" in httpx.get(f"{server.url}/metrics").text
        if counts is not (kind == "on"):
            raise RuntimeError(f"the server with metrics {kind} has {'some' if counts else 'none'} of ours")
    before = {kind: (answered[kind], _cpu_seconds(processes[kind])) for kind in servers}
    for _ in range(num_slices):
        await asyncio.sleep(seconds)
        now = {kind: (answered[kind], _cpu_seconds(processes[kind])) for kind in servers}
        slices.append(
            {
                kind: {
                    "answered": now[kind][0] - before[kind][0],
                    "cpu_seconds": now[kind][1] - before[kind][1],
                }
                for kind in servers
            }
        )
        before = now
        print(json.dumps(slices[-1]), flush=True)
    for client in clients:
        client.cancel()
    for outcome in await asyncio.gather(*clients, return_exceptions=True):
        if isinstance(outcome, Exception):  # a cancelled client is none
            raise outcome
    return slices


def _processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(time.user + time.system for time in times))


async def _client(kind: str, server: Server, index: int, answered: dict[str, int]) -> None:
    """One request after the other, until cancelled."""
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:
        while True:
            index += 1
            body = {
                "model": "ficoco-demo",
                "messages": [message("is there a red sign?", [IMAGES[index % len(IMAGES)]])],
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
            }
            answer = await client.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            answered[kind] += 1


IMAGES = [data_url(Image.new("RGB", (192, 192), (20 * index, 90, 160))) for index in range(12)]

if __name__ == "__main__":
    sys.exit(main())
