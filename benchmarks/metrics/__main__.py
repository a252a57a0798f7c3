"""`make bench-metrics`: throughput of a server with our metrics against one without, in one interleaved run.

Two servers of the demo model stand beside each other, alike but for `--ficoco-no-metrics`. They take turns: in each
round both get the same requests, the one that begins alternates, and the other is idle meanwhile. Compared are the
pairs of a round.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import httpx
import psutil
from PIL import Image

from benchmarks.bars import Bar, environment, report
from tests.support.server import Server, data_url, message, serve

RESULTS = Path(__file__).parent.parent / "results" / "metrics.json"
LIMIT_PERCENT = 1.0
KINDS = {"on": (), "off": ("--ficoco-no-metrics",)}
SERVE = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64")
# Two-sided 95% of Student's t, by degrees of freedom; beyond them the normal distribution's.
STUDENT = {5: 2.571, 7: 2.365, 9: 2.262, 11: 2.201, 13: 2.160, 15: 2.131, 19: 2.093, 23: 2.069}


def main() -> int:
    """Run the benchmark, write its JSON, print its bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--rounds", type=int, default=12, help="an even number (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=48, help="of a round, for each server")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    args = parser.parse_args()
    load = {"requests": args.requests, "concurrency": args.concurrency, "tokens": args.tokens}
    rounds: list[dict[str, dict[str, float]]] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            kind: stack.enter_context(serve(folder / kind, *SERVE, *options))
            for kind, options in KINDS.items()
        }
        for kind, server in servers.items():  # once unmeasured, so that every image was seen
            asyncio.run(_load(server, **load))
            counts = "ficoco:" in httpx.get(f"{server.url}/metrics").text
            if counts is not (kind == "on"):
                raise RuntimeError(
                    f"the server with metrics {kind} has {'some' if counts else 'none'} of ours"
                )
        for index in range(args.rounds):
            order = list(servers) if index % 2 == 0 else list(servers)[::-1]
            rounds.append({kind: _measure(servers[kind], load) for kind in order})
            print(json.dumps(rounds[-1]), flush=True)
    figures = {field: _overhead(rounds, field) for field in ("seconds", "cpu_seconds")}
    result = {"environment": environment(), "load": load, "overhead": figures, "rounds": rounds}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for field, figure in figures.items():
        print(f"{field}: {figure['percent']:+.2f}% +- {figure['noise_percent']:.2f}% with metrics")
    # A difference within the noise of the run is none.
    beyond = max(0.0, abs(figures["seconds"]["percent"]) - figures["seconds"]["noise_percent"])
    return report([Bar("metrics-overhead-percent-beyond-noise", beyond, LIMIT_PERCENT, at_least=False)])


def _overhead(rounds: list[dict[str, dict[str, float]]], field: str) -> dict[str, float]:
    """Mean over the rounds of on against off in percent, and half of its 95% interval."""
    percents = [100 * (entry["on"][field] / entry["off"][field] - 1) for entry in rounds]
    factor = STUDENT.get(len(percents) - 1, 1.96)
    return {"percent": fmean(percents), "noise_percent": factor * stdev(percents) / sqrt(len(percents))}


def _measure(server: Server, load: dict[str, int]) -> dict[str, float]:
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    before = _cpu_seconds(processes)
    start = time.perf_counter()
    asyncio.run(_load(server, **load))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "requests_per_second": load["requests"] / seconds,
        "cpu_seconds": _cpu_seconds(processes) - before,
    }


def _cpu_seconds(processes: list[Any]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(time.user + time.system for time in times))


async def _load(server: Server, requests: int, concurrency: int, tokens: int) -> None:
    """Send all requests, so many at once, and wait for the answers; every request has an image of its own."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=300) as client:

        async def one(index: int) -> None:
            body = {
                "model": "ficoco-demo",
                "messages": [message("is there a red sign?", [IMAGES[index % len(IMAGES)]])],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
            }
            async with gate:
                answer = await client.post("/v1/chat/completions", json=body)
                answer.raise_for_status()

        await asyncio.gather(*(one(index) for index in range(requests)))


IMAGES = [data_url(Image.new("RGB", (192, 192), (20 * index, 90, 160))) for index in range(12)]

if __name__ == "__main__":
    sys.exit(main())
