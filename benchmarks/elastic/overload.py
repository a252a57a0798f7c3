"""The experiment: the same rate of arrivals with the ceiling as a fixed budget, and with one that follows the load."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.benchmarks.elastic.driver import Answer, Driver, ttft

FLOOR, CEILING = 64, 576
# Tokens of an answer. Prompts of 576 visual tokens take 22 blocks of 32 with it, those of 64 take 6: two against
# seven concurrent requests in 44 blocks, one of which vLLM keeps for itself.
NUM_OUTPUT = 96
BLOCK_SIZE, NUM_BLOCKS = 32, 45
_FEWEST_ARRIVALS = 24


@dataclass(frozen=True)
class Length:
    """Lengths of the phases, and the controller's times.

    Attributes:
        capacity_seconds: of measuring the throughput of the fixed ceiling.
        overload_seconds: of arrivals above that.
    """

    capacity_seconds: float
    overload_seconds: float
    attack_seconds: float
    release_seconds: float
    max_release_seconds: float


SHORT = Length(8, 16, 0.3, 2, 8)
LONG = Length(20, 60, 1, 5, 60)


@dataclass(frozen=True)
class Phase:
    """One kind of budget under overload.

    Attributes:
        num_requests: that arrived.
        early_ttft_seconds: median of the first quarter of them.
        late_ttft_seconds: median of the last quarter.
        median_ttft_seconds: of all.
        longest_queue: most requests that waited at the same time, sampled.
        budgets: visual tokens that requests had, ascending.
        lowest_default: lowest budget of requests that name none, sampled.
    """

    num_requests: int
    early_ttft_seconds: float
    late_ttft_seconds: float
    median_ttft_seconds: float
    longest_queue: int
    budgets: tuple[int, ...]
    lowest_default: int


@dataclass(frozen=True)
class Result:
    """Figures of both phases.

    Attributes:
        capacity: requests a second that the fixed ceiling serves.
        rate: of the arrivals in both phases.
        fixed: phase in which every request names the ceiling.
        elastic: phase in which no request names a budget.
        return_seconds: from the end of that phase until the default was the ceiling again, with light traffic.
    """

    capacity: float
    rate: float
    fixed: Phase
    elastic: Phase
    return_seconds: float


def arguments(length: Length, num_servers: int) -> list[str]:
    """Options of a server whose KV cache is the bottleneck."""
    elastic = {
        "floor": FLOOR,
        "ceiling": CEILING,
        "levels": 3,
        "attack_seconds": length.attack_seconds,
        "release_seconds": length.release_seconds,
        "max_release_seconds": length.max_release_seconds,
    }
    options = ["--ficoco-method", "ficoco-v", "--ficoco-elastic", json.dumps(elastic)]
    options += ["--trust-request-mm-kwargs", "--no-enable-prefix-caching", "--max-model-len", "1024"]
    options += ["--block-size", str(BLOCK_SIZE), "--num-gpu-blocks-override", str(NUM_BLOCKS)]
    return [*options, "--api-server-count", str(num_servers)]


async def overload(
    driver: Driver, metric: Callable[[str], float], length: Length, overload_factor: float = 1.6
) -> Result:
    """Run both phases on one server, which was started with `arguments`.

    Args:
        driver: of the server, with `NUM_OUTPUT` tokens an answer.
        metric: sum of one Prometheus metric of the server over its labels.
        length: of the phases.
        overload_factor: rate of the arrivals relative to the throughput of the fixed ceiling.

    Raises:
        TimeoutError: the default does not return to the ceiling.
    """
    explicit: dict[str, Any] = {"mm_processor_kwargs": {"ficoco_keep": CEILING}}
    num_text = (await driver.ask(**explicit)).num_prompt_tokens - CEILING
    capacity = await driver.capacity(length.capacity_seconds, 6, **explicit)
    rate = overload_factor * capacity
    # On a slow machine few requests arrive in a phase; a queue shows in two dozen.
    seconds = max(length.overload_seconds, min(_FEWEST_ARRIVALS / rate, 3 * length.overload_seconds))
    phases = []
    for extra in (explicit, {}):
        await _returned(driver, metric, length)
        phases.append(await _phase(driver, metric, rate, seconds, num_text, extra))
    begin = time.monotonic()
    await _returned(driver, metric, length)
    returned = time.monotonic() - begin
    return Result(capacity, rate, phases[0], phases[1], returned)


async def _phase(
    driver: Driver,
    metric: Callable[[str], float],
    rate: float,
    seconds: float,
    num_text: int,
    extra: dict[str, Any],
) -> Phase:
    waiting, defaults = [0], [CEILING]

    async def watch() -> None:
        while True:
            await asyncio.sleep(0.5)
            waiting.append(int(await asyncio.to_thread(metric, "vllm:num_requests_waiting")))
            defaults.append(int(await asyncio.to_thread(metric, "ficoco:default_budget_tokens")))

    watcher = asyncio.create_task(watch())
    answers: list[Answer] = await driver.arrive(rate, seconds, **extra)
    watcher.cancel()
    return Phase(
        num_requests=len(answers),
        early_ttft_seconds=ttft(answers, 0, 0.25),
        late_ttft_seconds=ttft(answers, 0.75, 1),
        median_ttft_seconds=ttft(answers, 0, 1),
        longest_queue=max(waiting),
        budgets=tuple(sorted({answer.num_prompt_tokens - num_text for answer in answers})),
        lowest_default=min(defaults),
    )


async def _returned(driver: Driver, metric: Callable[[str], float], length: Length) -> None:
    """One request after the other until the default is the ceiling."""
    deadline = time.monotonic() + 30 + 4 * length.max_release_seconds
    while int(await asyncio.to_thread(metric, "ficoco:default_budget_tokens")) < CEILING:
        if time.monotonic() > deadline:
            raise TimeoutError("the budget has not returned to the ceiling")
        await driver.ask()
        await asyncio.sleep(0.5)
