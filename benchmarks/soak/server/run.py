"""The mixture sent to a server in rounds, with a look at what the server holds after each."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any
from uuid import uuid4

import psutil

from ficoco_vllm.benchmarks.harness.http import samples
from ficoco_vllm.benchmarks.soak.server.client import ABORTED, FAULTS, Answer, Client, Outcome
from ficoco_vllm.benchmarks.soak.server.mixture import Request

QUEUE = "vllm:num_requests_waiting"
# Must be 0 in a server without requests.
GAUGES = (
    "vllm:num_requests_running",
    QUEUE,
    "vllm:kv_cache_usage_perc",
    "ficoco:kv_blocks_held",
    "ficoco:kv_blocks_saved",
)
FINISHED, OUTCOMES, RESPONSES = "vllm:request_success_total", "ficoco:requests_total", "http_requests_total"
# Counters by the label that says how a request ended.
COUNTERS = {
    FINISHED: "finished_reason",
    OUTCOMES: "outcome",
    RESPONSES: "status",
    "vllm:num_preemptions_total": "",
}
# The server notices disconnects, and its gauges follow, within this time.
SETTLE_SECONDS = 60.0
_NUM_LISTED = 20
# Between two looks at the queue.
_QUEUE_SECONDS = 0.1
Counts = Mapping[str, Mapping[str, float]]


@dataclass
class Outcomes:
    """How the requests of a run ended.

    Attributes:
        aborts: disconnects by when they happened.
        refusals: that the server's own counter must show.
        num_compared: answers to the sample under load.
        alone: answers to the sample, sent alone.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    aborts: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    faults: list[str] = field(default_factory=list)
    num_compared: int = 0
    different: list[str] = field(default_factory=list)
    alone: dict[int, Answer] = field(default_factory=dict)

    def add(self, request: Request, outcome: Outcome) -> None:
        """Count an outcome, and compare the answer to a sample with the one sent alone."""
        self.outcomes[outcome.kind] += 1
        self.refusals += request.counted_refusal
        if outcome.kind == ABORTED:
            self.aborts[str(request.abort)] += 1
        if outcome.kind in FAULTS and len(self.faults) < _NUM_LISTED:
            self.faults.append(f"{request.name}: {outcome.kind}: {outcome.why}: {request.body[-300:]!r}")
        if outcome.answer is None or request.sample is None:
            return
        alone = self.alone.setdefault(request.sample, outcome.answer)
        self.num_compared += alone is not outcome.answer
        if not alone.agrees(outcome.answer) and len(self.different) < _NUM_LISTED:
            self.different.append(f"{request.sample}: {alone} alone, {outcome.answer}")


async def run(
    client: Client,
    pid: int,
    requests: Sequence[Request],
    num_requests: int,
    num_per_round: int = 240,
    num_open: int = 24,
    burst_every: int = 4,
) -> dict[str, Any]:
    """Send requests in rounds.

    Args:
        client: client of the server.
        pid: process id of the server's first process.
        requests: the mixture, which is repeated.
        num_requests: number of requests of the run.
        num_per_round: after which the server is looked at.
        num_open: requests at the same time.
        burst_every: once in this many rounds, all requests of a round are sent at the same time.

    Returns:
        `num_requests`, `seconds`; `outcomes`, `aborts`, `refusals`, `faults`; `counted`, the server's counters of
        the same requests; `num_compared`, `different`; `longest_queue` of a burst; `rounds`, a look after each.
    """
    outcomes, rounds, longest_queue = Outcomes(), list[dict[str, Any]](), 0.0
    before, start = read_counts(await client.metrics()), time.monotonic()
    sample = {request.sample: request for request in requests if request.sample is not None}
    for request in sample.values():
        outcomes.add(request, await client.ask(request, uuid4().hex))
    closing = next(one for one in requests if one.num_tokens and not (one.abort or one.stream))
    supply, sent = cycle(requests), 0
    while sent < num_requests:
        batch = list(islice(supply, min(num_per_round, num_requests - sent)))
        is_burst = (len(rounds) + 1) % burst_every == 0
        at_once = len(batch) if is_burst else num_open
        longest_queue = max(longest_queue, await _round(client, batch, at_once, outcomes, sent))
        sent += len(batch)
        rounds.append({"num_requests": sent, "burst": is_burst, **await look(client, pid, outcomes, closing)})
        print(f"{sent} requests, {rounds[-1]['mib']:.0f} MiB, {dict(outcomes.outcomes)}", flush=True)
    after, ended = read_counts(await client.metrics()), vars(outcomes).copy()
    del ended["alone"]
    return {
        "num_requests": sent + len(sample) + sum(row["num_closing"] for row in rounds),
        "seconds": round(time.monotonic() - start, 1),
        **ended,
        "counted": {
            name: {label: value - before[name].get(label, 0.0) for label, value in values.items()}
            for name, values in after.items()
        },
        "longest_queue": longest_queue,
        "rounds": rounds,
    }


async def look(client: Client, pid: int, outcomes: Outcomes, closing: Request) -> dict[str, Any]:
    """Wait until the server is idle and report what it still holds.

    vLLM updates its gauges when an engine steps; one more request, sent alone, brings them up to date after an abort.
    """
    deadline, num_closing = time.monotonic() + SETTLE_SECONDS, 0
    while True:
        num_closing += 1
        outcomes.add(closing, await client.ask(closing, uuid4().hex))
        gauges = read_gauges(await client.metrics())
        if not any(gauges.values()) or time.monotonic() > deadline:
            return {"gauges": gauges, "num_closing": num_closing, "mib": round(tree_mib(pid), 1)}
        await asyncio.sleep(0.2)


async def _round(
    client: Client, requests: Sequence[Request], num_open: int, outcomes: Outcomes, first: int
) -> float:
    """Send requests, a number of them at the same time; returns the longest queue seen."""
    free = asyncio.Semaphore(num_open)

    async def send(request: Request, number: int) -> None:
        async with free:
            outcomes.add(request, await client.ask(request, uuid4().hex, number))

    sending = asyncio.gather(*(send(request, first + index) for index, request in enumerate(requests)))
    longest = 0.0
    while not sending.done():
        longest = max(longest, read_gauges(await client.metrics())[QUEUE])
        await asyncio.wait([sending], timeout=_QUEUE_SECONDS)
    await sending
    return longest


def read_gauges(text: str) -> dict[str, float]:
    """Each of `GAUGES`, added up over its labels."""
    totals = dict.fromkeys(GAUGES, 0.0)
    for sample in samples(text):
        if sample.name in totals:
            totals[sample.name] += sample.value
    return totals


def read_counts(text: str) -> Counts:
    """Each of `COUNTERS`, by its label."""
    totals = {name: defaultdict[str, float](float) for name in COUNTERS}
    for sample in samples(text):
        if sample.name in totals:
            totals[sample.name][sample.labels.get(COUNTERS[sample.name], "")] += sample.value
    return totals


def tree_mib(pid: int) -> float:
    """Memory of a process and its descendants, MiB; shared pages count once (PSS)."""
    num_bytes = 0
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                num_bytes += process.memory_full_info().pss
    return num_bytes / 2**20
