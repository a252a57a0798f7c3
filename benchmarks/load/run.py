"""Rounds of turns: each server is started, sent the traffic and stopped before the next one starts."""

from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from typing import Any

from ficoco_vllm.benchmarks.harness.serving import STOCK, Served, serving
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.benchmarks.load.client import run_point
from ficoco_vllm.benchmarks.load.settings import Target, Turn
from ficoco_vllm.compat import set_cpu_defaults

# Requests that a server answers before anything is measured: it compiles, grows its pools, fills its thread pools.
_WARM_UP = 4
_WARM_UP_SEED = 2**31 - 1


def run_turns(turns: list[Turn], target: Target, url: str | None = None) -> list[dict[str, Any]]:
    """Rows of all turns, against the server that is up at a URL or, without one, a server that each turn starts.

    Returns:
        One mapping a point: `server`, `round`, `point`, `traffic`, `seed` and the figures of `run_point`.

    Raises:
        RuntimeError: a server does not start, or a request fails.
    """
    rows = []
    total = sum(_WARM_UP + sum(traffic.num_requests for traffic, _ in turn.points) for turn in turns)
    with Task("requests", total) as task:
        for turn in turns:
            if url is not None:
                rows += run_turn(turn, url, target, task)
                continue
            task.describe(f"round {turn.round_index + 1}, starting {turn.server.name}")
            with _started(turn, target) as served:
                rows += run_turn(turn, served.url, target, task)
    return rows


def run_turn(turn: Turn, url: str, target: Target, task: Task) -> list[dict[str, Any]]:
    """Run the points of one turn against a server that is up; see `run_turns`."""
    first = turn.points[0][0]
    warm_up = replace(first, num_requests=_WARM_UP, rate=None, concurrency=_WARM_UP)
    rows = []
    for traffic, seed in [(warm_up, _WARM_UP_SEED), *turn.points]:
        name = "warm-up" if traffic is warm_up else traffic.name
        label = f"round {turn.round_index + 1}, {turn.server.name}, {name}"
        task.describe(label)

        def finished(count: float, before: int = task.done, most: int = traffic.num_requests) -> None:
            task.advance(before + min(int(count), most) - task.done)

        point = run_point(url, target, traffic, seed, finished)
        finished(traffic.num_requests)
        if traffic is warm_up:
            continue
        head = {"server": turn.server.name, "round": turn.round_index, "point": traffic.name}
        rows.append({**head, "traffic": asdict(traffic), "seed": seed, **point})
        figures = f"{point['request_throughput']:.2f} requests/s, TTFT {point['ttft_ms_p50']:.0f} ms (median)"
        task.say(f"{label}: {figures}")
    return rows


def _started(turn: Turn, target: Target) -> AbstractContextManager[Served]:
    server = turn.server
    log = target.log_folder / f"{turn.round_index}-{server.name}.log"
    options = ["--served-model-name", target.name, *target.options]
    set_cpu_defaults()  # ours does so itself: on a CPU both get the same threads
    if server.method is None:
        # No plugin of ours is loaded: this is the vLLM that a user has without us.
        return serving(["--model", target.model, *options], log, {"VLLM_PLUGINS": ""}, STOCK)
    options += ["--ficoco-method", server.method]
    options += [] if server.keep is None else ["--ficoco-keep", str(server.keep)]
    return serving([target.model, *options], log)
