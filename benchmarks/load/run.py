"""Rounds of turns: each server is started, sent the traffic and stopped before the next one starts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.serving import STOCK, serving
from ficoco_vllm.benchmarks.load.client import run_point
from ficoco_vllm.benchmarks.load.settings import Turn
from ficoco_vllm.compat import set_cpu_defaults

# Requests that a server answers before anything is measured: it compiles, grows its pools, fills its thread pools.
_WARM_UP = 4
_WARM_UP_SEED = 2**31 - 1


@dataclass(frozen=True)
class Target:
    """What is served, and how.

    Attributes:
        model: folder or name; None for the demo model.
        tokenizer: folder or name, of the client.
        options: of vLLM's server, alike for every server.
        log_folder: takes the logs of the servers.
    """

    model: str
    name: str
    tokenizer: str
    options: tuple[str, ...]
    log_folder: Path


def run_turns(
    turns: list[Turn], target: Target, sample_seconds: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run all turns on servers of our own.

    Returns:
        One mapping a point: `server`, `round`, `traffic`, `seed` and the figures of `run_point`.

    Raises:
        RuntimeError: a server does not start, or a request fails.
    """
    rows = []
    for turn in turns:
        with _started(turn, target) as url:
            rows += run_turn(turn, url, target, None, sample_seconds, say)
    return rows


def run_turn(
    turn: Turn,
    url: str,
    target: Target,
    headers: Mapping[str, str] | None,
    sample_seconds: float,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Run the points of one turn against a server that is up; see `run_turns`."""
    first = turn.points[0][0]
    warm_up = first.model_copy(update={"num_requests": _WARM_UP, "rate": None, "concurrency": _WARM_UP})
    run_point(url, target.name, target.tokenizer, warm_up, _WARM_UP_SEED, headers, sample_seconds)
    rows = []
    for traffic, seed in turn.points:
        point = run_point(url, target.name, target.tokenizer, traffic, seed, headers, sample_seconds)
        head = {"server": turn.server.name, "round": turn.round_index, "point": traffic.name}
        rows.append({**head, "traffic": traffic.model_dump(), "seed": seed, **point})
        say(
            f"round {turn.round_index}, {turn.server.name}, {traffic.name}: "
            f"{point['request_throughput']:.2f} requests/s, TTFT {point['ttft_ms_p50']:.0f} ms"
        )
    return rows


@contextmanager
def _started(turn: Turn, target: Target) -> Iterator[str]:
    server = turn.server
    log = target.log_folder / f"{turn.round_index}-{server.name}.log"
    options = ["--served-model-name", target.name, *target.options]
    set_cpu_defaults()  # ours does so itself: on a CPU both get the same threads
    if server.method is None:
        # No plugin of ours is loaded: this is the vLLM that a user has without us.
        started = serving(["--model", target.model, *options], log, {"VLLM_PLUGINS": ""}, STOCK)
    else:
        ours = ["--ficoco-method", server.method]
        ours += [] if server.keep is None else ["--ficoco-keep", str(server.keep)]
        started = serving([target.model, *options, *ours], log)
    with started as served:
        yield served.url
