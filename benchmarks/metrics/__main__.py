"""`make bench-metrics`: what our metrics cost, of a server with them against one without, slice by slice.

Two servers of the demo model stand beside each other, alike but for `--ficoco-no-metrics`. One after the other they
get the same requests, each with an image that no cache knows; who comes first changes at random. Whatever else the
machine does changes slowly against a pair of slices, so the pairs are compared: CPU seconds of all of a server's
processes, and seconds of the clock. One client and one thread, so that both do the same steps with the same work.
Beside it, our part alone is timed on vLLM's own objects (`hooks.py`).
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

import httpx
import psutil
from PIL import Image

from ficoco_vllm.benchmarks.bars import Bar, environment, report
from ficoco_vllm.benchmarks.metrics.paired import Overhead, Slice
from tests.support.server import Server, data_url, message, serve

RESULTS = Path(__file__).parent.parent / "results" / "metrics.json"
LIMIT_PERCENT = 1.0
KINDS = {"on": (), "off": ("--ficoco-no-metrics",)}
SERVE = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64")
# Threads that wait for each other by spinning take CPU time, more or less of it as it comes.
ENVIRONMENT = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
NUM_TOKENS = 16
_WARM_UP, _FEWEST_PAIRS = 4, 30


def main() -> int:
    """Run the benchmark, write its JSON, print its bars."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=240, help="of measuring, as many pairs as fit")
    parser.add_argument("--requests", type=int, default=8, help="of a slice")
    parser.add_argument("--concurrency", type=int, default=1, help="clients of a slice")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    hooks = json.loads(
        subprocess.run(
            [sys.executable, "-m", "ficoco_vllm.benchmarks.metrics.hooks"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()[-1]
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            kind: stack.enter_context(serve(folder / kind, *SERVE, *options, **ENVIRONMENT))
            for kind, options in KINDS.items()
        }
        pairs = asyncio.run(_run(servers, args.seconds, args.requests, args.concurrency, args.seed))
    overhead = {
        "cpu": Overhead.of([(pair["on"].cpu_seconds, pair["off"].cpu_seconds) for pair in pairs]),
        "clock": Overhead.of([(pair["on"].seconds, pair["off"].seconds) for pair in pairs]),
    }
    request_seconds = fmean(pair["off"].cpu_seconds for pair in pairs) / args.requests
    ours = hooks["request_microseconds"] + NUM_TOKENS * hooks["token_microseconds"]
    hooks["percent_of_a_request"] = 100 * ours / 1e6 / request_seconds
    result = {
        "environment": environment(),
        "seed": args.seed,
        "load": {
            "pairs": len(pairs),
            "requests": args.requests,
            "concurrency": args.concurrency,
            "tokens": NUM_TOKENS,
        },
        "cpu_seconds_of_a_request": request_seconds,
        "requests_a_second": args.requests / fmean(pair["off"].seconds for pair in pairs),
        "overhead": {name: asdict(figure) for name, figure in overhead.items()},
        "hooks": hooks,
        "slices": [{kind: asdict(part) for kind, part in pair.items()} for pair in pairs],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, figure in overhead.items():
        interval = f"{figure.low_percent:+.2f}% to {figure.high_percent:+.2f}%"
        print(f"{name}: {figure.percent:+.2f}% ({interval}), noise {figure.noise_percent:.1f}%")
    print(f"hooks: {hooks}")
    return report(list(_bars(overhead, hooks)))


def _bars(overhead: Mapping[str, Overhead], hooks: Mapping[str, float]) -> Iterator[Bar]:
    for name, figure in overhead.items():
        yield Bar(
            f"metrics-{name}-percent-beyond-noise", figure.beyond_noise_percent, LIMIT_PERCENT, at_least=False
        )
    yield Bar("metrics-hooks-percent", hooks["percent_of_a_request"], LIMIT_PERCENT, at_least=False)


async def _run(
    servers: Mapping[str, Server], seconds: float, num_requests: int, concurrency: int, seed: int
) -> list[dict[str, Slice]]:
    generator = random.Random(seed)
    pairs = []
    processes = {kind: _processes(server) for kind, server in servers.items()}
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        for kind, server in servers.items():
            counts = "ficoco:" in (await client.get(f"{server.url}/metrics")).text
            if counts is not (kind == "on"):
                raise RuntimeError(
                    f"the server with metrics {kind} has {'some' if counts else 'none'} of ours"
                )
        end = perf_counter() + seconds
        while len(pairs) < _WARM_UP + _FEWEST_PAIRS or perf_counter() < end:
            bodies = [_body(generator) for _ in range(num_requests)]
            pair = {}
            for kind in generator.sample(sorted(servers), len(servers)):
                pair[kind] = await _slice(client, servers[kind], processes[kind], bodies, concurrency)
            pairs.append(pair)
    return pairs[_WARM_UP:]


async def _slice(
    client: httpx.AsyncClient,
    server: Server,
    processes: list[psutil.Process],
    bodies: list[dict[str, Any]],
    concurrency: int,
) -> Slice:
    """All requests, so many at once."""
    left = list(bodies)

    async def ask() -> None:
        while left:
            answer = await client.post(f"{server.url}/v1/chat/completions", json=left.pop())
            answer.raise_for_status()

    cpu_seconds, start = _cpu_seconds(processes), perf_counter()
    await asyncio.gather(*(ask() for _ in range(concurrency)))
    return Slice(perf_counter() - start, _cpu_seconds(processes) - cpu_seconds)


def _body(generator: random.Random) -> dict[str, Any]:
    """A chat about an image of one colour, which is hardly ever drawn twice."""
    colour = tuple(generator.randbytes(3))
    return {
        "model": "ficoco-demo",
        "messages": [message("is there a red sign?", [data_url(Image.new("RGB", (192, 192), colour))])],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
    }


def _processes(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(time.user + time.system for time in times))


if __name__ == "__main__":
    sys.exit(main())
