"""Second answers: requests that are chosen are answered again, in the background, and both answers are compared."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind, SamplingParams

from ficoco_vllm.hooks.api_server import hook_generation, hook_handlers
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.quality.allowance import Allowance
from ficoco_vllm.request_fields import FIELD, KEEP, KEEP_RATIO, METHOD
from ficoco_vllm.server.media.connector import remembered
from ficoco_vllm.server.quality.answers import Answer, acceptance, same_text
from ficoco_vllm.server.quality.budget import QualityBudget, traffic
from ficoco_vllm.server.quality.figures import Figures
from ficoco_vllm.server.quality.served import ServedBudget
from ficoco_vllm.server.request_field.routes import HANDLERS
from ficoco_vllm.server.request_field.schema import OFF

# Handlers on vLLM's state whose answers are compared.
_COMPARED = ("openai_serving_chat", "openai_serving_completion", "openai_serving_responses")
# Below any priority that a client would name; vLLM serves larger numbers later.
LOWEST_PRIORITY = 2**31 - 1
# Comparisons that wait in a process; further requests are not chosen.
MAX_WAITING = 8
# Time for which a comparison waits for room, and between two looks.
WAIT_SECONDS, LOOK_SECONDS = 60.0, 0.05
# Time for the second answers of a comparison. At the lowest priority they may never have their turn.
ANSWER_SECONDS = 300.0

logger = init_logger("vllm.ficoco.quality")


@dataclass
class Chosen:
    """A request that is compared.

    Attributes:
        request: copy of vLLM's request as it came.
        handler: answers it.
        name: its class of traffic.
        suspects: whether it was chosen on a suspicion.
        media: images that were fetched for it.
        served: budget of the first answer. It differs from that of its class where the load asks for more tokens, and
            in a chat that keeps the budget of its first turn.
        answer: the first answer.
        is_greedy: whether it is decoded greedily.
        num_calls: prompts that it sent to the engine.
    """

    request: Any
    handler: Callable[..., Awaitable[Any]]
    name: str
    suspects: bool
    media: dict[Any, Any] = field(default_factory=dict)
    served: ServedBudget | None = None
    answer: Answer = field(default_factory=Answer)
    is_greedy: bool = True
    num_calls: int = 0


@dataclass
class Second:
    """A second answer.

    Attributes:
        forced: tokens that the prompt is to end in, whose log-probabilities are the answer; None generates.
        with_logprobs: whether those of the generated tokens are needed.
        answer: as far as it has come.
    """

    forced: tuple[int, ...] | None = None
    with_logprobs: bool = False
    answer: Answer = field(default_factory=Answer)


@dataclass(frozen=True)
class First:
    """A request that names no budget, and the comparison that it is chosen for."""

    chosen: Chosen | None = None


_current: ContextVar[First | Second | None] = ContextVar("ficoco_quality", default=None)


class Comparer:
    """Chooses and compares requests of one API server process.

    Attributes:
        budget: takes the scores.
        plan: plan of the server.
        has_priorities: whether the scheduler sorts by priority.
        figures: counts what is compared.
    """

    def __init__(
        self, budget: QualityBudget, plan: ServerPlan, figures: Figures, *, has_priorities: bool
    ) -> None:
        self.budget = budget
        self.plan = plan
        self.has_priorities = has_priorities
        self.figures = figures
        settings = budget.settings
        # A budget from the state of an earlier server is watched from the first request on.
        is_reduced = any(state.served < state.top for state in budget.states.values())
        self._allowance = Allowance(settings, time.monotonic(), is_ready=is_reduced)
        self._random = random.Random(settings.seed)
        self._waiting: set[asyncio.Task[None]] = set()
        self._one = asyncio.Lock()
        self._engine_client: Any = None

    def attach(self, state: Any, engine_client: Any) -> None:
        """Wrap vLLM's handlers and the engine. Call it after the request field's.

        Args:
            state: application state of vLLM's server.
            engine_client: vLLM's `AsyncLLM`.
        """
        compared = {name: method for name, method, _ in HANDLERS if name in _COMPARED}
        hook_handlers(state, compared, self._handle)
        hook_generation(engine_client, self._generate)
        self._engine_client = engine_client

    async def _handle(
        self, handler: Callable[..., Awaitable[Any]], request: Any, raw_request: Any = None
    ) -> Any:
        """Answer a request, with the budget of its class if it names none."""
        if isinstance(_current.get(), Second) or not _names_no_budget(request):
            return await handler(request, raw_request)
        name = self.budget.class_of(_class_name(self.budget.settings, request, raw_request))
        in_class = traffic.set(name)
        chosen = self._choose(request, handler, name)
        as_first = _current.set(First(chosen))
        with_media = remembered.set(None if chosen is None else chosen.media)
        try:
            return await handler(request, raw_request)
        finally:
            remembered.reset(with_media)
            _current.reset(as_first)
            traffic.reset(in_class)

    def _choose(self, request: Any, handler: Callable[..., Awaitable[Any]], name: str) -> Chosen | None:
        suspects = self.budget.suspects(name)
        share = self._allowance.share(time.monotonic(), suspects=suspects)
        # Sampled for every request, so that the choice depends on the seed and the order of the requests alone.
        if self._random.random() >= share or len(self._waiting) >= MAX_WAITING or not _is_comparable(request):
            return None
        if not self.budget.next_rungs(name, top_reduces=self._top_reduces):
            self.budget.record(name, ())
            return None
        return Chosen(_copy_of(request), handler, name, suspects)

    @property
    def _top_reduces(self) -> bool:
        top = self.budget.budgets[-1]
        return top < self.plan.most or self.plan.tower_keep(top) < self.plan.tower.most_keep

    def _generate(
        self,
        original: Callable[..., AsyncIterator[Any]],
        prompt: Any,
        params: Any,
        *args: Any,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Send one prompt to the engine, and record the answer where it is compared."""
        current = _current.get()
        if current is None or not isinstance(params, SamplingParams):
            return original(prompt, params, *args, **kwargs)
        if isinstance(current, Second):
            if self.has_priorities:
                kwargs["priority"] = LOWEST_PRIORITY
            prompt, params = _second_call(current, prompt, params)
            outputs = original(prompt, params, *args, **kwargs)
            return current.answer.watch(outputs, params.output_kind)
        has_images = _has_images(prompt)
        if has_images:
            self._allowance.earn(len(prompt["prompt_token_ids"]))
        chosen = current.chosen
        if chosen is None or not has_images:
            return original(prompt, params, *args, **kwargs)
        chosen.num_calls += 1
        chosen.served = ServedBudget.of(prompt, params.extra_args or {})
        chosen.is_greedy = params.temperature == 0
        if not chosen.is_greedy and params.logprobs is None:
            params = copy(params)
            params.logprobs = 0  # of the token itself
        outputs = chosen.answer.watch(original(prompt, params, *args, **kwargs), params.output_kind)
        return self._then_compare(outputs, chosen)

    async def _then_compare(self, outputs: AsyncIterator[Any], chosen: Chosen) -> AsyncIterator[Any]:
        async for output in outputs:
            yield output
        if chosen.answer.is_complete and chosen.num_calls == 1:
            task = asyncio.get_running_loop().create_task(self._compare(chosen))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)

    async def _compare(self, chosen: Chosen) -> None:
        """Answer a request again where there is room, and record the scores."""
        traffic.set(chosen.name)  # a task has a context of its own
        remembered.set(chosen.media)
        try:
            async with self._one:
                if not await self._room():
                    self.figures.skip("no room")
                    return
                async with asyncio.timeout(ANSWER_SECONDS):
                    scores = await self._scores(chosen)
        except TimeoutError:
            self.figures.skip("no room")
            return
        except Exception as error:  # no client waits for a second answer
            if self._engine_client.errored:  # the server ends, and says so itself
                return
            self.figures.skip("failed")
            # Its text may quote the request.
            logger.warning("ficoco: a request could not be answered a second time: %s", type(error).__name__)
            return
        for index, score in scores:
            self.figures.score(self.budget.budgets[index], chosen.name, score)
        self.budget.record(chosen.name, scores)

    async def _room(self) -> bool:
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.budget.has_room:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return True

    async def _scores(self, chosen: Chosen) -> list[tuple[int, float]]:
        served = chosen.served
        assert served is not None
        rungs = self.budget.next_rungs(chosen.name, top_reduces=self._top_reduces)
        full: Answer | None = None
        scores = []
        for index in reversed(rungs):  # the served one first
            keep = self.budget.budgets[index]
            is_given = served.is_of(self.plan, keep)
            answer = chosen.answer if is_given else await self._again(chosen, keep)
            if not chosen.is_greedy:
                forced = await self._again(chosen, None, tuple(answer.token_ids))
                score = acceptance(answer, forced)
            else:
                if full is None:
                    is_full = served.keeps_all(self.plan)
                    full = chosen.answer if is_full else await self._again(chosen, None)
                score = same_text(answer, full)
            scores.append((index, score))
        return scores

    async def _again(self, chosen: Chosen, keep: int | None, forced: tuple[int, ...] | None = None) -> Answer:
        """Answer a request a second time.

        Args:
            chosen: the request.
            keep: visual tokens of an image, None for all.
            forced: tokens whose log-probabilities are requested instead of an answer.

        Raises:
            RuntimeError: there is no answer.
        """
        second = Second(forced, with_logprobs=not chosen.is_greedy)
        token = _current.set(second)
        try:
            response = await chosen.handler(_with_keep(chosen.request, keep), None)
        finally:
            _current.reset(token)
            self._allowance.spend(second.answer.num_tokens, suspects=chosen.suspects)
            self.figures.spend(second.answer.num_tokens)
        if not second.answer.is_complete:
            raise RuntimeError(getattr(getattr(response, "error", None), "message", "it was not answered"))
        return second.answer


def _second_call(second: Second, prompt: Any, params: SamplingParams) -> tuple[Any, SamplingParams]:
    """Prompt and parameters of a second answer."""
    if second.forced is None:
        params = copy(params)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        if second.with_logprobs and params.logprobs is None:
            params.logprobs = 0
        return prompt, params
    tokens = [*prompt["prompt_token_ids"], *second.forced]
    scoring = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=0,
        detokenize=False,
        extra_args=params.extra_args,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    return {**prompt, "prompt_token_ids": tokens}, scoring


def _has_images(prompt: Any) -> bool:
    return isinstance(prompt, dict) and bool((prompt.get("mm_placeholders") or {}).get("image"))


def _names_no_budget(request: Any) -> bool:
    """Whether a request leaves method and budget to the server. Others are neither compared nor changed."""
    if (request.model_extra or {}).get(FIELD) is not None:
        return False
    extensions = (getattr(request, "mm_processor_kwargs", None), getattr(request, "vllm_xargs", None))
    return not any(
        name in values
        for values in extensions
        if isinstance(values, Mapping)
        for name in (KEEP, KEEP_RATIO, METHOD)
    )


def _is_comparable(request: Any) -> bool:
    """Whether a request has one answer, of which the prompt is not a part."""
    several = getattr(request, "n", None) not in (None, 1)
    others = ("use_beam_search", "echo", "prompt_logprobs", "background", "previous_response_id")
    return not several and not any(getattr(request, name, None) for name in others)


def _class_name(settings: Any, request: Any, raw_request: Any) -> str | None:
    """The class of traffic that a request names, as the operator reads it."""
    if settings.class_header is not None:
        return None if raw_request is None else raw_request.headers.get(settings.class_header)
    if settings.class_metadata is None:
        return None
    metadata = getattr(request, "metadata", None) or (request.model_extra or {}).get("metadata")
    value = metadata.get(settings.class_metadata) if isinstance(metadata, Mapping) else None
    return value if isinstance(value, str) else None


def _copy_of(request: Any) -> Any:
    """Copy of a request for a second answer: not streamed, not stored, with another id."""
    updates: dict[str, Any] = {"stream": False}
    for name, value in (("stream_options", None), ("store", False)):
        if name in type(request).model_fields:
            updates[name] = value
    fresh = type(request).model_fields.get("request_id")
    if fresh is not None:
        updates["request_id"] = fresh.get_default(call_default_factory=True)
    return request.model_copy(update=updates, deep=True)


def _with_keep(request: Any, keep: int | None) -> Any:
    """A copy of the request with a budget, None for all tokens."""
    again = _copy_of(request)
    again.__pydantic_extra__ = {**(again.model_extra or {}), FIELD: OFF if keep is None else {"keep": keep}}
    return again
