"""Feeds an engine in this process, and looks at what it holds whenever nothing is left to do."""

import ctypes
import gc
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from vllm import LLM, SamplingParams

from ficoco_vllm.benchmarks.soak.load import Ask, asks
from tests.support.engine import phase_of, request, scheduler_of, worker_of

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Length and mixture of a run.

    Attributes:
        num_requests: in all.
        num_per_round: between two looks; the engine is empty then.
        num_open: requests at once.
        abort_share: of the requests.
        seed: of the mixture.
    """

    num_requests: int = 2000
    num_per_round: int = 50
    num_open: int = 16
    abort_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Look:
    """What an engine without requests holds.

    Attributes:
        num_requests: answered or given up until then.
        num_free_blocks: of the pool that all groups share.
        num_held_blocks: of each group.
        num_plans: that scheduler and worker remember.
        rss_mib: memory of the process without what malloc keeps in reserve, MiB.
    """

    num_requests: int
    num_free_blocks: int
    num_held_blocks: tuple[int, ...]
    num_plans: int
    rss_mib: float


def look(engine: LLM, num_requests: int = 0) -> Look:
    """Look at an engine."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of glibc
    scheduler = scheduler_of(engine)
    cache = scheduler.kv_cache_manager
    groups = cache.coordinator.single_type_managers
    with open("/proc/self/statm", encoding="ascii") as statm:
        rss_pages = int(statm.read().split()[1])
    return Look(
        num_requests=num_requests,
        num_free_blocks=cache.block_pool.get_num_free_blocks(),
        num_held_blocks=tuple(
            max(group.num_held, sum(map(len, group.req_to_blocks.values()))) for group in groups
        ),
        num_plans=len(scheduler.plans) + len(worker_of(engine).model_runner.model_state.plans),
        rss_mib=rss_pages * PAGE_BYTES / _MIB,
    )


def drive(engine: LLM, settings: Settings, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Send all requests.

    Args:
        engine: in this process, with a method of the decoder.
        settings: of the run.
        say: takes a line about each round.

    Returns:
        `start`, a `Look`; `rounds`, one after each round; `num_finished`; `num_aborted` by the phase of the request;
        `num_preempted`.

    Raises:
        RuntimeError: an answer has another length than was asked for.
    """
    supply = asks(settings.seed, settings.abort_share)
    start, rounds, sent = look(engine), [], 0
    with Driver(engine, settings.num_open) as driver:
        while sent < settings.num_requests:
            count = min(settings.num_per_round, settings.num_requests - sent)
            driver.answer([next(supply) for _ in range(count)])
            sent += count
            rounds.append(look(engine, sent))
            say(
                f"{sent} requests, {rounds[-1].num_free_blocks} blocks free, {rounds[-1].rss_mib:.0f} MiB, "
                f"{driver.num_preempted} preempted, aborted: {dict(driver.num_aborted)}"
            )
    return {
        "start": asdict(start),
        "rounds": [asdict(found) for found in rounds],
        "num_finished": driver.num_finished,
        "num_aborted": dict(sorted(driver.num_aborted.items())),
        "num_preempted": driver.num_preempted,
    }


class Driver:
    """Keeps some requests open; gives up those that are to be given up.

    Within the block it listens to the scheduler: a request whose prompt has just been computed is given up where vLLM
    works off the aborts that came in meanwhile, before it takes notice of the step's tokens.
    """

    def __init__(
        self,
        engine: LLM,
        num_open: int,
        on_answer: Callable[[Ask, list[int]], None] = lambda ask, tokens: None,
    ) -> None:
        """Drive one engine.

        Args:
            engine: in this process.
            num_open: requests at once.
            on_answer: takes each request that was not given up, and the tokens of its answer.
        """
        self.engine = engine
        self.num_open = num_open
        self.on_answer = on_answer
        self.num_finished = 0
        self.num_preempted = 0
        self.num_aborted: Counter[str] = Counter()
        self._scheduler = scheduler_of(engine)
        self._open: dict[str, Ask] = {}

    def __enter__(self) -> "Driver":
        scheduler = self._scheduler
        preempt, update = scheduler._preempt_request, scheduler.update_from_output

        def preempt_counted(*args: Any, **kwargs: Any) -> Any:
            self.num_preempted += 1
            return preempt(*args, **kwargs)

        def update_later(*args: Any, **kwargs: Any) -> Any:
            self._abort("prefilled")
            return update(*args, **kwargs)

        scheduler._preempt_request, scheduler.update_from_output = preempt_counted, update_later
        return self

    def __exit__(self, *exception: object) -> None:
        del self._scheduler._preempt_request, self._scheduler.update_from_output

    def answer(self, waiting: list[Ask]) -> None:
        """Answer requests, the last of the list first, until the engine is empty."""
        core = self.engine.llm_engine
        while waiting or self._open:
            while waiting and len(self._open) < self.num_open:
                ask = waiting.pop()
                body, params = request(ask.prompt, ask.images), _params(ask)
                (name,) = self.engine.enqueue([body], [params], use_tqdm=False)
                self._open[name] = ask
            self._abort("waiting", "decoding", "preempted")
            for output in core.step():
                if output.finished:
                    self._finish(output)
        while core.has_unfinished_requests():
            core.step()
        core.step()  # the worker hears of the last ones

    def _abort(self, *phases: str) -> None:
        for name, ask in list(self._open.items()):
            phase = phase_of(self._scheduler.requests.get(name))
            if phase in phases and phase == ask.abort_in:
                self.num_aborted[phase] += 1
                self.engine.llm_engine.abort_request([name], internal=True)
                del self._open[name]

    def _finish(self, output: Any) -> None:
        # vLLM's front end tells the name of a request without what it has added to it.
        name = next(name for name in self._open if name.startswith(f"{output.request_id}-"))
        ask, tokens = self._open.pop(name), list(output.outputs[0].token_ids)
        if len(tokens) != ask.num_tokens:
            raise RuntimeError(f"{len(tokens)} tokens where {ask.num_tokens} were asked for: {ask}")
        self.num_finished += 1
        self.on_answer(ask, tokens)


def _params(ask: Ask) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=ask.num_tokens, ignore_eos=True, extra_args=ask.extra or None
    )
