"""Sends the mixture to a server, in rounds, and looks at what the server holds whenever nothing is left to do."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any
from uuid import uuid4

from ficoco_vllm.benchmarks.endurance.asks import Ask
from ficoco_vllm.benchmarks.endurance.client import ABORTED, FAULTS, Answer, Client, Outcome
from ficoco_vllm.benchmarks.endurance.watch import QUEUE, difference, read_counts, read_gauges, tree_mib

# Requests that were given up are noticed, and gauges follow, within so long.
SETTLE_SECONDS = 60.0
_NUM_TOLD = 20
# Between two looks at the queue.
_QUEUE_SECONDS = 0.5


@dataclass(frozen=True)
class Settings:
    """Length and rhythm of a run.

    Attributes:
        num_requests: in all.
        num_per_round: between two looks.
        num_open: requests at once.
        burst_every: of so many rounds one sends all of its requests at once.
    """

    num_requests: int = 10_000
    num_per_round: int = 240
    num_open: int = 24
    burst_every: int = 4


@dataclass
class Ledger:
    """How requests ended.

    Attributes:
        kinds: how many ended how.
        aborts: of those given up, when.
        refusals: that the server's own counter of refusals has to know.
        faults: the first ones, in words.
        alone: answers of the sample, asked alone.
        num_compared: answers of the sample under load.
        different: those that say something else.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    aborts: Counter[str] = field(default_factory=Counter)
    refusals: int = 0
    faults: list[str] = field(default_factory=list)
    alone: dict[int, Answer] = field(default_factory=dict)
    num_compared: int = 0
    different: list[str] = field(default_factory=list)

    def note(self, ask: Ask, outcome: Outcome) -> None:
        """Note how a request ended, and hold the answer of a sample against the one alone."""
        self.kinds[outcome.kind] += 1
        self.refusals += ask.counted_refusal
        if outcome.kind == ABORTED:
            self.aborts[str(ask.abort)] += 1
        if outcome.kind in FAULTS and len(self.faults) < _NUM_TOLD:
            self.faults.append(f"{ask.name}: {outcome.kind}: {outcome.why}: {ask.body[-300:]!r}")
        if outcome.answer is None or ask.sample is None:
            return
        alone = self.alone.setdefault(ask.sample, outcome.answer)
        self.num_compared += alone is not outcome.answer
        if not alone.agrees(outcome.answer) and len(self.different) < _NUM_TOLD:
            self.different.append(f"{ask.sample}: {alone} alone, {outcome.answer}")


async def drive(
    client: Client,
    pid: int,
    asks: Sequence[Ask],
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Send all requests.

    Args:
        client: of the server.
        pid: of the first of its processes.
        asks: the mixture, over and over.
        settings: of the run.
        say: takes a line about each round.

    Returns:
        `num_requests`, `seconds`; `outcomes`, `aborts`, `refusals`, `faults`; `counted`, what the server's counters
        say of the same requests; `num_compared`, `different`; `longest_queue` of a burst; `rounds`, a look after each.
    """
    ledger, rounds, longest_queue = Ledger(), [], 0.0
    before, start = read_counts(await client.metrics()), time.monotonic()
    samples = {ask.sample: ask for ask in asks if ask.sample is not None}
    for ask in samples.values():
        ledger.note(ask, await client.send(ask, _name()))
    closing = next(ask for ask in asks if ask.num_tokens and not (ask.abort or ask.stream))
    supply, sent = cycle(asks), 0
    while sent < settings.num_requests:
        number = len(rounds) + 1
        batch = list(islice(supply, min(settings.num_per_round, settings.num_requests - sent)))
        is_burst = number % settings.burst_every == 0
        open_at_once = len(batch) if is_burst else settings.num_open
        queue = await _round(client, batch, open_at_once, ledger, sent)
        longest_queue = max(longest_queue, queue)
        sent += len(batch)
        rounds.append({"num_requests": sent, "burst": is_burst, **await look(client, pid, ledger, closing)})
        rate = sent / (time.monotonic() - start)
        say(f"{sent} requests, {rate:.1f}/s, {rounds[-1]['mib']:.0f} MiB, {dict(ledger.kinds)}")
    counted = difference(read_counts(await client.metrics()), before)
    return {
        "num_requests": sent + len(samples) + sum(row["num_closing"] for row in rounds),
        "seconds": round(time.monotonic() - start, 1),
        "outcomes": dict(ledger.kinds),
        "aborts": dict(ledger.aborts),
        "refusals": ledger.refusals,
        "faults": ledger.faults,
        "num_compared": ledger.num_compared,
        "different": ledger.different,
        "counted": counted,
        "longest_queue": longest_queue,
        "rounds": rounds,
    }


async def look(client: Client, pid: int, ledger: Ledger, closing: Ask) -> dict[str, Any]:
    """Wait until the server is empty and tell what it still holds.

    vLLM moves its gauges when an engine steps, so that after an abort they would stay as they were: one more request
    is asked, alone.
    """
    deadline, num_closing = time.monotonic() + SETTLE_SECONDS, 0
    while True:
        num_closing += 1
        ledger.note(closing, await client.send(closing, _name()))
        gauges = read_gauges(await client.metrics())
        if not any(gauges.values()) or time.monotonic() > deadline:
            return {"gauges": gauges, "num_closing": num_closing, "mib": round(tree_mib(pid), 1)}
        await asyncio.sleep(0.2)


async def _round(client: Client, asks: Sequence[Ask], num_open: int, ledger: Ledger, first: int) -> float:
    """Send some requests, so many at once.

    Returns:
        The longest queue that was seen.
    """
    free = asyncio.Semaphore(num_open)

    async def send(ask: Ask, number: int) -> None:
        async with free:
            ledger.note(ask, await client.send(ask, _name(), number))

    sending = asyncio.gather(*(send(ask, first + index) for index, ask in enumerate(asks)))
    longest = 0.0
    while not sending.done():
        longest = max(longest, read_gauges(await client.metrics())[QUEUE])
        await asyncio.wait([sending], timeout=_QUEUE_SECONDS)
    await sending
    return longest


def _name() -> str:
    return uuid4().hex
