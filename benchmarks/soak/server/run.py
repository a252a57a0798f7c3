"""The mixture sent to a server in rounds, with a look at what the server holds after each."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle, islice
from typing import Any

import psutil

from ficoco_vllm.benchmarks.harness.http import samples
from ficoco_vllm.benchmarks.soak.server.client import ABORTED, FAULTS, Client, Outcome
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
# Requests that have ended, those of the sample that are sent alone first.
Ended = list[tuple[Request, Outcome]]


def summarise(ended: Ended) -> dict[str, Any]:
    """How requests ended, and whether the answers to the sample are those to the same questions sent alone.

    Returns:
        `outcomes` by their kind; `aborts`, disconnects by when they happened; `refusals` that the server's own counter
        must show; the first `faults`; `num_compared` answers to the sample, and the first `different` ones.
    """
    faults = [
        f"{request.name}: {outcome.kind}: {outcome.why}: {request.body[-300:]!r}"
        for request, outcome in ended
        if outcome.kind in FAULTS
    ]
    answers = [
        (request.sample, outcome.answer)
        for request, outcome in ended
        if request.sample is not None and outcome.answer is not None
    ]
    alone = dict(reversed(answers))  # the first answer to each
    different = [
        f"{sample}: {alone[sample]} alone, {answer}"
        for sample, answer in answers
        if not alone[sample].agrees(answer)
    ]
    return {
        "outcomes": Counter(outcome.kind for _, outcome in ended),
        "aborts": Counter(request.abort for request, outcome in ended if outcome.kind == ABORTED),
        "refusals": sum(request.counted_refusal for request, _ in ended),
        "faults": faults[:_NUM_LISTED],
        "num_compared": len(answers) - len(alone),
        "different": different[:_NUM_LISTED],
    }


async def run(
    client: Client,
    pid: int,
    requests: Sequence[Request],
    num_requests: int,
    num_per_round: int = 240,
    num_open: int = 24,
    burst_every: int = 4,
) -> dict[str, Any]:
    """Send a mixture of requests, repeated, in rounds, to a server whose first process has the id `pid`.

    `num_open` requests are open at the same time; once in `burst_every` rounds all of a round are.

    Returns:
        `num_requests`, `seconds`, what `summarise` finds; `counted`, the server's counters of the same requests;
        `longest_queue` of a burst; `rounds`, a look after each.
    """
    ended, rounds, longest_queue = Ended(), list[dict[str, Any]](), 0.0
    before, start = read_counts(await client.metrics()), time.monotonic()
    sample = {request.sample: request for request in requests if request.sample is not None}
    for request in sample.values():
        ended.append((request, await client.ask(request)))
    closing = next(one for one in requests if one.num_tokens and not (one.abort or one.stream))
    supply, sent = cycle(requests), 0
    while sent < num_requests:
        batch = list(islice(supply, min(num_per_round, num_requests - sent)))
        at_once = num_open if (len(rounds) + 1) % burst_every else len(batch)
        longest_queue = max(longest_queue, await _round(client, batch, at_once, ended))
        sent += len(batch)
        rounds.append({"num_requests": sent, **await look(client, pid, ended, closing)})
        kinds = Counter(outcome.kind for _, outcome in ended)
        print(f"{sent} requests, {rounds[-1]['mib']:.0f} MiB, {dict(kinds)}", flush=True)
    after = read_counts(await client.metrics())
    return {
        "num_requests": sent + len(sample) + sum(row["num_closing"] for row in rounds),
        "seconds": round(time.monotonic() - start, 1),
        **summarise(ended),
        "counted": {name: after[name] - before[name] for name in COUNTERS},
        "longest_queue": longest_queue,
        "rounds": rounds,
    }


async def look(client: Client, pid: int, ended: Ended, closing: Request) -> dict[str, Any]:
    """Wait until the server is idle and report what it still holds.

    vLLM updates its gauges when an engine steps; one more request, sent alone, brings them up to date after an abort.
    """
    deadline, num_closing = time.monotonic() + SETTLE_SECONDS, 0
    while True:
        num_closing += 1
        ended.append((closing, await client.ask(closing)))
        gauges = read_gauges(await client.metrics())
        if not any(gauges.values()) or time.monotonic() > deadline:
            return {"gauges": gauges, "num_closing": num_closing, "mib": round(tree_mib(pid), 1)}
        await asyncio.sleep(0.2)


async def _round(client: Client, requests: Sequence[Request], num_open: int, ended: Ended) -> float:
    """Send requests, a number of them at the same time; returns the longest queue seen."""
    free = asyncio.Semaphore(num_open)

    async def send(request: Request, number: int) -> None:
        async with free:
            ended.append((request, await client.ask(request, number)))

    sending = asyncio.gather(*(send(request, number) for number, request in enumerate(requests)))
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


def read_counts(text: str) -> dict[str, Counter[str]]:
    """Each of `COUNTERS`, by its label."""
    totals = {name: Counter[str]() for name in COUNTERS}
    for sample in samples(text):
        if sample.name in totals:
            totals[sample.name][sample.labels.get(COUNTERS[sample.name], "")] += int(sample.value)
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
