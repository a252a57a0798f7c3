"""Mixed requests to an engine in this process, and what it holds whenever it has none."""

import ctypes
import gc
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ficoco_vllm.benchmarks.harness import engine as harness
from ficoco_vllm.benchmarks.soak.engine.mixture import Request, make_requests

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """Length and mixture of a run.

    Attributes:
        num_per_round: after which the engine is empty and looked at.
        adapters: folders of LoRA adapters; each request has one of them.
    """

    num_requests: int = 2000
    num_per_round: int = 50
    num_open: int = 16
    abort_share: float = 0.2
    seed: int = 0
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True)
class Look:
    """State of an engine without requests.

    Attributes:
        num_requests: answered or aborted until then.
        num_free_blocks: of the pool that all groups share.
        rss_mib: memory of the process without what malloc keeps in reserve, MiB.
    """

    num_requests: int
    num_free_blocks: int
    num_held_blocks: tuple[int, ...]
    num_plans: int
    rss_mib: float


def look(engine: "LLM", num_requests: int = 0) -> Look:
    """State of an engine."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of glibc
    scheduler = harness.scheduler_of(engine)
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
        num_plans=len(scheduler.plans) + len(harness.worker_of(engine).model_runner.model_state.plans),
        rss_mib=rss_pages * PAGE_BYTES / _MIB,
    )


def run(engine: "LLM", settings: Settings, say: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Send all requests.

    Args:
        engine: in this process, with a method of the decoder.
        settings: of the run.
        say: takes a line about each round.

    Returns:
        `start`, a `Look`; `rounds`, one after each round; `num_finished`; `num_aborted` by the phase of the request;
        `num_preempted`; `num_in_chunks`, requests whose prompts took several steps; `num_found`, answers for whose
        prompts the prefix cache had tokens; `num_adapted`, answers by an adapter.

    Raises:
        RuntimeError: an answer has another length than requested.
    """
    supply = make_requests(settings.seed, settings.abort_share, len(settings.adapters))
    start, rounds, sent = look(engine), list[Look](), 0
    with Driver(engine, settings.num_open, adapters=settings.adapters) as driver:
        while sent < settings.num_requests:
            count = min(settings.num_per_round, settings.num_requests - sent)
            driver.answer([next(supply) for _ in range(count)])
            sent += count
            rounds.append(look(engine, sent))
            if say is not None:
                say(
                    f"{sent} requests, {rounds[-1].num_free_blocks} blocks free, {rounds[-1].rss_mib:.0f} MiB, "
                    f"{driver.num_preempted} preempted, aborted: {dict(driver.num_aborted)}"
                )
    return {
        "start": asdict(start),
        "rounds": [asdict(row) for row in rounds],
        "num_finished": driver.num_finished,
        "num_aborted": dict(sorted(driver.num_aborted.items())),
        "num_preempted": driver.num_preempted,
        "num_in_chunks": len(driver.in_chunks),
        "num_found": driver.num_found,
        "num_adapted": driver.num_adapted,
    }


class Driver:
    """Keeps some requests open, and aborts those whose `abort_in` says so.

    Within the block it wraps three methods of the scheduler. Two are counted; in the third a request whose prompt has
    just been computed is aborted at the point where vLLM handles the aborts that came in meanwhile, before it reads the
    tokens of the step.
    """

    def __init__(
        self,
        engine: "LLM",
        num_open: int,
        on_answer: Callable[[Request, list[int]], None] = lambda request, tokens: None,
        adapters: Sequence[str] = (),
    ) -> None:
        """Drive one engine.

        Args:
            engine: in this process.
            num_open: requests at the same time.
            on_answer: takes each request that was not aborted, and the tokens of its answer.
            adapters: folders of the LoRA adapters that requests name by their numbers.
        """
        self.engine = engine
        self.num_open = num_open
        self.on_answer = on_answer
        self.num_finished = 0
        self.num_preempted = 0
        self.num_found = 0
        self.num_adapted = 0
        self.in_chunks: set[str] = set()
        self.adapters = adapters
        self.num_aborted: Counter[str] = Counter()
        self._scheduler = harness.scheduler_of(engine)
        self._open: dict[str, Request] = {}

    def __enter__(self) -> "Driver":
        scheduler = self._scheduler
        preempt, update = scheduler._preempt_request, scheduler.update_from_output
        schedule = scheduler.schedule

        def preempt_counted(*args: Any, **kwargs: Any) -> Any:
            self.num_preempted += 1
            return preempt(*args, **kwargs)

        def update_later(*args: Any, **kwargs: Any) -> Any:
            self._abort("prefilled")
            return update(*args, **kwargs)

        def schedule_counted(*args: Any, **kwargs: Any) -> Any:
            step = schedule(*args, **kwargs)
            self.in_chunks |= {
                name for name in step.num_scheduled_tokens if _is_cut(scheduler.requests[name])
            }
            return step

        scheduler._preempt_request, scheduler.update_from_output = preempt_counted, update_later
        scheduler.schedule = schedule_counted
        return self

    def __exit__(self, *exception: object) -> None:
        del self._scheduler._preempt_request, self._scheduler.update_from_output, self._scheduler.schedule

    def answer(self, waiting: list[Request]) -> None:
        """Answer requests, the last of the list first, until the engine is empty."""
        core = self.engine.llm_engine
        while waiting or self._open:
            while waiting and len(self._open) < self.num_open:
                request = waiting.pop()
                body = harness.request(request.prompt, request.images)
                adapter = self._adapter(request)
                (name,) = self.engine.enqueue([body], [_params(request)], adapter, use_tqdm=False)
                self._open[name] = request
            self._abort("waiting", "decoding", "preempted")
            for output in core.step():
                if output.finished:
                    self._finish(output)
        while core.has_unfinished_requests():
            core.step()
        core.step()  # the worker frees what it holds of the last ones

    def _abort(self, *phases: str) -> None:
        for name, request in list(self._open.items()):
            phase = harness.phase_of(self._scheduler.requests.get(name))
            if phase in phases and phase == request.abort_in:
                self.num_aborted[phase] += 1
                self.engine.llm_engine.abort_request([name], internal=True)
                del self._open[name]

    def _adapter(self, request: Request) -> "list[LoRARequest] | None":
        from vllm.lora.request import LoRARequest

        if not request.adapter:
            return None
        folder = self.adapters[request.adapter - 1]
        return [LoRARequest(folder, request.adapter, folder)]

    def _finish(self, output: Any) -> None:
        # vLLM's front end adds to the name of a request, and leaves that out in its outputs.
        name = next(name for name in self._open if name.startswith(f"{output.request_id}-"))
        request, tokens = self._open.pop(name), list(output.outputs[0].token_ids)
        if len(tokens) != request.num_tokens:
            raise RuntimeError(f"{len(tokens)} tokens instead of {request.num_tokens}: {request}")
        self.num_finished += 1
        self.num_found += bool(output.num_cached_tokens)
        self.num_adapted += bool(request.adapter)
        self.on_answer(request, tokens)


def _is_cut(request: Any) -> bool:
    """Whether the step that was just scheduled leaves tokens of a prompt to later ones."""
    return bool(request.num_computed_tokens < request.num_prompt_tokens)


def _params(request: Request) -> "SamplingParams":
    from vllm import SamplingParams

    extra = request.extra or None
    return SamplingParams(temperature=0, max_tokens=request.num_tokens, ignore_eos=True, extra_args=extra)
