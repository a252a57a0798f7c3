"""A server in numbers: arrivals, a KV cache of a given size, and steps that take longer the more they compute."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from ficoco_vllm.server.elastic.controller import start, step
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.load.reports import Load

# Between two reports of the load, as on the server.
REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Machine:
    """Capacity of the simulated server.

    Attributes:
        kv_tokens: that the KV cache holds.
        step_seconds: of a step without work.
        prefill_seconds: for each token of a prompt.
        decode_seconds: for each running request.
        max_running: concurrent requests.
        max_batched: tokens of prompts in one step.
    """

    kv_tokens: int = 8000
    step_seconds: float = 0.02
    prefill_seconds: float = 5e-5
    decode_seconds: float = 2e-4
    max_running: int = 256
    max_batched: int = 2048


@dataclass
class Request:
    """One request; its prompt was sized when it arrived."""

    arrival_seconds: float
    num_prompt: int
    num_left: int
    num_kv: int = 0
    first_token_seconds: float | None = None


@dataclass
class Run:
    """Record of a simulation.

    Attributes:
        budgets: (seconds, budget) at every report.
        waiting: (seconds, waiting requests) at every report.
        requests: all of them, in order of arrival.
    """

    budgets: list[tuple[float, int]] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def changes(self, begin: float, end: float) -> int:
        """Number of budget changes in a span of time."""
        values = [budget for time, budget in self.budgets if begin <= time < end]
        return sum(left != right for left, right in pairwise(values))

    def range(self, begin: float, end: float) -> set[int]:
        """Budgets in a span of time."""
        return {budget for time, budget in self.budgets if begin <= time < end}

    def longest_queue(self, begin: float, end: float) -> int:
        """The most requests that waited at the same time in a span of time."""
        return max(waiting for time, waiting in self.waiting if begin <= time < end)

    def ttft(self, begin: float, end: float) -> list[float]:
        """Seconds to the first token, of requests that arrived in a span of time and were answered, sorted."""
        return sorted(
            request.first_token_seconds - request.arrival_seconds
            for request in self.requests
            if begin <= request.arrival_seconds < end and request.first_token_seconds is not None
        )


def poisson(rate: Callable[[float], float], seconds: float, seed: int) -> Iterator[float]:
    """Times of arrivals at a rate that changes with time (requests a second)."""
    rng = random.Random(seed)
    most = max(rate(second) for second in range(int(seconds)))
    time = 0.0
    while True:
        time += rng.expovariate(most)
        if time >= seconds:
            return
        if rng.random() < rate(time) / most:
            yield time


def evenly(rate: Callable[[float], float], seconds: float) -> Iterator[float]:
    """Evenly spaced times of arrivals."""
    time, done = 0.0, 0.0
    while time < seconds:
        done += rate(time) * 0.001
        if done >= 1:
            done -= 1
            yield time
        time += 0.001


def simulate(
    settings: ElasticSettings | None,
    arrivals: Iterator[float],
    seconds: float,
    *,
    machine: Machine | None = None,
    num_text: int = 60,
    num_output: int = 100,
    fixed: int = 576,
) -> Run:
    """Run the server, first come, first served, with preemption of the youngest.

    Args:
        settings: of the controller; None gives every request `fixed` visual tokens.
        arrivals: times, ascending.
        seconds: how long.
        machine: what it runs on.
        num_text: tokens of a prompt beside its image.
        num_output: tokens of an answer.
        fixed: see `settings`.
    """
    machine = machine or Machine()
    run, waiting, running = Run(), deque[Request](), list[Request]()
    state = None if settings is None else start(settings, 0.0)
    coming = next(arrivals, None)
    now, report, preempted = 0.0, REPORT_SECONDS, 0
    while now < seconds:
        budget = fixed if settings is None or state is None else settings.budgets[state.level]
        while coming is not None and coming <= now:
            request = Request(coming, num_text + budget, num_output)
            run.requests.append(request)
            waiting.append(request)
            coming = next(arrivals, None)
        free = machine.kv_tokens - sum(request.num_kv for request in running)
        num_prefilled = 0
        while waiting and len(running) < machine.max_running:
            need = waiting[0].num_prompt
            if free <= need or num_prefilled + need > machine.max_batched:
                break
            request = waiting.popleft()
            request.num_kv = request.num_prompt
            free -= need
            num_prefilled += need
            running.append(request)
        while free < len(running):
            victim = running.pop()
            free += victim.num_kv
            victim.num_kv = 0
            waiting.appendleft(victim)
            preempted += 1
        now += (
            machine.step_seconds
            + machine.prefill_seconds * num_prefilled
            + machine.decode_seconds * len(running)
        )
        for request in running:
            request.num_kv += 1
            request.num_left -= 1
            if request.first_token_seconds is None:
                request.first_token_seconds = now
        running = [request for request in running if request.num_left > 0]
        if now >= report:
            usage = sum(request.num_kv for request in running) / machine.kv_tokens
            load = Load(usage, len(running), len(waiting), preempted)
            preempted = 0
            if settings is not None and state is not None:
                state = step(settings, state, load, now)
            run.budgets.append((now, budget))
            run.waiting.append((now, len(waiting)))
            report = now + REPORT_SECONDS
    return run
