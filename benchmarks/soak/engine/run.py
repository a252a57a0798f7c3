"""Mixed requests to an engine in this process, and what it holds whenever it has none."""

import ctypes
import gc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psutil

from ficoco_vllm.benchmarks.harness import engine as harness
from ficoco_vllm.benchmarks.soak.engine.mixture import Request, make_requests

if TYPE_CHECKING:
    from vllm import LLM


def look(engine: "LLM") -> dict[str, Any]:
    """State of an engine without requests, as in `run`."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # of glibc
    scheduler = harness.scheduler_of(engine)
    cache = scheduler.kv_cache_manager
    return {
        "num_free_blocks": cache.block_pool.get_num_free_blocks(),
        "num_held_blocks": [
            max(group.num_held, sum(map(len, group.req_to_blocks.values())))
            for group in cache.coordinator.single_type_managers
        ],
        "num_plans": len(scheduler.plans) + len(harness.worker_of(engine).model_runner.model_state.plans),
        "rss_mib": psutil.Process().memory_info().rss / 2**20,
    }


def run(
    engine: "LLM",
    num_requests: int,
    num_per_round: int,
    seed: int,
    adapters: Sequence[str] = (),
    num_open: int = 16,
    abort_share: float = 0.2,
) -> dict[str, Any]:
    """Send all requests, `num_open` at the same time, to an engine in this process; see `make_requests`.

    Returns:
        `start` and `rounds`, the state at first and after each round: `num_requests` until then, `num_free_blocks` of
        the pool that all groups share, `num_held_blocks` of each group, `num_plans`, and `rss_mib`, the memory of the
        process without what malloc keeps in reserve; and the counts of the `Driver`.

    Raises:
        RuntimeError: an answer has another length than requested.
    """
    supply = make_requests(seed, abort_share, len(adapters))
    driver, start, rounds, sent = Driver(engine, num_open, adapters), look(engine), list[dict[str, Any]](), 0
    while sent < num_requests:
        count = min(num_per_round, num_requests - sent)
        driver.answer([next(supply) for _ in range(count)])
        sent += count
        rounds.append({"num_requests": sent, **look(engine)})
        print(rounds[-1], f"{driver.num_preempted} preempted, {dict(driver.num_aborted)}", flush=True)
    return {
        "start": start,
        "rounds": rounds,
        "num_finished": driver.num_finished,
        "num_aborted": dict(sorted(driver.num_aborted.items())),
        "num_preempted": driver.num_preempted,
        "num_in_chunks": len(driver.in_chunks),
        "num_found": driver.num_found,
        "num_adapted": driver.num_adapted,
    }


@dataclass
class Driver:
    """Keeps some requests of an engine open, aborts those whose `abort_in` says so, and counts.

    Attributes:
        num_open: requests at the same time.
        adapters: folders of the LoRA adapters that requests name by their numbers.
        on_answer: takes each request that was not aborted, and the tokens of its answer.
        num_found: answers for whose prompts the prefix cache had tokens.
        in_chunks: names of the requests whose prompts took several steps.
        num_aborted: number of aborted requests by the phase of the request.
    """

    engine: "LLM"
    num_open: int
    adapters: Sequence[str] = ()
    on_answer: Callable[[Request, list[int]], None] = lambda request, tokens: None
    num_finished: int = 0
    num_preempted: int = 0
    num_found: int = 0
    num_adapted: int = 0
    in_chunks: set[str] = field(default_factory=set)
    num_aborted: Counter[str] = field(default_factory=Counter)
    _open: dict[str, Request] = field(default_factory=dict, init=False)

    def answer(self, waiting: list[Request]) -> None:
        """Answer requests, the last of the list first, until the engine is empty.

        What a step schedules is counted. A request whose prompt has just been computed is aborted at the point where
        vLLM handles the aborts that came in meanwhile, before it reads the tokens of the step.
        """
        core, scheduler = self.engine.llm_engine, harness.scheduler_of(self.engine)
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def schedule_counted(*args: Any) -> Any:
            step = schedule(*args)
            self.num_preempted += len(step.preempted_req_ids or ())
            # The step leaves tokens of their prompts to later ones.
            self.in_chunks |= {
                name
                for name in step.num_scheduled_tokens
                if scheduler.requests[name].num_computed_tokens < scheduler.requests[name].num_prompt_tokens
            }
            return step

        def update_later(*args: Any) -> Any:
            self._abort("prefilled")
            return update(*args)

        with patch.multiple(scheduler, schedule=schedule_counted, update_from_output=update_later):
            while waiting or self._open:
                while waiting and len(self._open) < self.num_open:
                    self._enqueue(waiting.pop())
                self._abort("waiting", "decoding", "preempted")
                for output in core.step():
                    if output.finished:
                        self._finish(output)
            while core.has_unfinished_requests():
                core.step()
            core.step()  # the worker frees what it holds of the last ones

    def _enqueue(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        params = SamplingParams(
            temperature=0, max_tokens=request.num_tokens, ignore_eos=True, extra_args=request.extra or None
        )
        folder = self.adapters[request.adapter - 1] if request.adapter else ""
        adapters = [LoRARequest(folder, request.adapter, folder)] if folder else None
        body = harness.request(request.prompt, request.images)
        (name,) = self.engine.enqueue([body], [params], adapters, use_tqdm=False)
        self._open[name] = request

    def _abort(self, *phases: str) -> None:
        requests = harness.scheduler_of(self.engine).requests
        for name, request in list(self._open.items()):
            phase = harness.phase_of(requests.get(name))
            if phase in phases and phase == request.abort_in:
                self.num_aborted[phase] += 1
                self.engine.llm_engine.abort_request([name], internal=True)
                del self._open[name]

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
