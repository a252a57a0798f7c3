"""Explanation of a request: the chat with and without reduction, and the trace of the former."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.processing import BUDGET, SIZES
from ficoco_vllm.request_fields import KEEP, MAX_TRACE_ID, METHOD, TRACE
from ficoco_vllm.server.explain.chat import Reply, send_chat
from ficoco_vllm.server.explain.pages import examples
from ficoco_vllm.server.explain.schema import ExplainRequest, Explanation, Measured, Options
from ficoco_vllm.server.explain.served_model import ServedModel
from ficoco_vllm.server.explain.views import TracedImage
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds
from ficoco_vllm.tracing.chain import Step, read_steps

# A worker only hands over recorded data; one that takes longer does not answer at all.
_RPC_SECONDS = 60.0
# Concurrent explanations in this process; the others wait. Each takes one of the few traces that a worker holds.
MAX_CONCURRENT = 2


class TraceLostError(RuntimeError):
    """A trace was incomplete when it was fetched."""


def trusting(chat: Any) -> tuple[Any, list[Any]]:
    """Copy vLLM's chat handler for one chat of ours: the copy accepts our arguments of the image processor.

    Clients never reach the copy; the chat route stays as the operator configured it.

    Args:
        chat: vLLM's `OpenAIServingChat`.

    Returns:
        The copy, and a list that receives the prompts that it renders.
    """
    ours, renderer = copy(chat), copy(chat.online_renderer)
    renderer.trust_request_mm_kwargs = True
    prompts: list[Any] = []

    async def record(render: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
        rendered = await render(*args, **kwargs)
        prompts.extend(rendered[1])
        return rendered

    wrap(renderer, "preprocess_chat", record)
    ours.online_renderer = renderer
    return ours, prompts


@dataclass(frozen=True)
class _Traced:
    """One chat with its trace."""

    reply: Reply
    image: TracedImage
    steps: list[Step]


class Explainer:
    """Explains requests to one API server.

    All input of a client passes the handler of vLLM's chat route, with its image loader, its limits and its errors.
    """

    def __init__(self, engine_client: Any, chat: Any, bounds: Bounds = UNBOUNDED) -> None:
        """Read the served model's configuration.

        Args:
            engine_client: vLLM's `AsyncLLM`.
            chat: vLLM's `OpenAIServingChat`.
            bounds: the operator's bounds for the answer with reduction; the other one always keeps all tokens.
        """
        self.bounds = bounds
        self.engine_client = engine_client
        # A copy of its own: requests of clients go through wrappers that the original gets later.
        self.chat = copy(chat)
        self.chat.online_renderer = copy(chat.online_renderer)
        self.served = ServedModel.of(engine_client.vllm_config)
        self._is_warm = False
        self._limit = asyncio.Semaphore(MAX_CONCURRENT)

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        return str(self.chat.models.base_model_paths[0].name)

    def options(self) -> Options:
        """Choices for the page."""
        served, allowed = self.served, self.bounds.methods
        return Options(
            model=self.model,
            methods=[choice for choice in served.methods if allowed is None or choice.name in allowed],
            method=served.method,
            keep=served.keep,
            min_keep=self.bounds.min_keep,
            max_keep=served.most,
            grid=served.tower.shape.grid,
            examples=examples(),
        )

    async def explain(self, request: ExplainRequest, raw_request: Any) -> Explanation:
        """Answer with and without reduction, and describe the reduction.

        Args:
            request: the client's request, parsed.
            raw_request: the client's HTTP request.

        Raises:
            RefusedError: vLLM answers with an error.
            TraceLostError: other requests have replaced the trace.
            VLLMValidationError: the request is not allowed.
        """
        async with self._limit:
            return await self._explain(request, raw_request)

    async def _explain(self, request: ExplainRequest, raw_request: Any) -> Explanation:
        method = request.method or self.served.method
        keep = self.served.keep if request.keep is None else request.keep
        try:
            if request.method is not None:
                self.bounds.check_method("method", request.method)
            # The planners refuse values that no server allows, with their own messages.
            if request.keep is not None and 1 <= request.keep < self.bounds.min_keep:
                self.bounds.check_keep("keep", request.keep, self.served.most)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error
        if not self._is_warm:
            # The first run of each kind on a server takes longer and must not be measured.
            short = request.model_copy(update={"max_tokens": 1})
            await self._chat(short, raw_request, method, keep)
            await self._chat(short, raw_request, None, None)
            self._is_warm = True
        full = None
        if request.compare:
            full = self._measured(await self._chat(request, raw_request, None, None), None)
        traced = await self._chat(request, raw_request, method, keep)
        layers, destinations = Explanation.summarize(traced.steps)
        return Explanation(
            model=self.model,
            question=request.question,
            method=method,
            keep=keep,
            views=list(traced.image.views),
            grid=traced.image.views[0].grid,
            central_square=self.served.central_square,
            reduced=self._measured(traced, method),
            full=full,
            layers=layers,
            destinations=destinations,
        )

    async def _chat(
        self, request: ExplainRequest, raw_request: Any, method: str | None, keep: int | None
    ) -> _Traced:
        """Send one chat, and fetch its trace. Its unique trace id keeps its image out of every cache."""
        trace_id = secrets.randbelow(MAX_TRACE_ID)
        chat = ChatCompletionRequest.model_validate(
            {
                "model": self.model,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": request.image}},
                            {"type": "text", "text": request.question},
                        ],
                    }
                ],
                "temperature": 0,
                "max_tokens": request.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._budget(method, keep, trace_id),
            }
        )
        handler, prompts = trusting(self.chat)
        try:
            reply = await send_chat(handler, chat, raw_request)
        finally:
            # Always fetched, so that no trace stays in the workers.
            traces = await self.engine_client.collective_rpc(
                "ficoco_take_trace", timeout=_RPC_SECONDS, args=(trace_id,)
            )
        # All workers that hold a part of a layer record the same trace.
        trace: list[dict[str, Any]] = next((trace for trace in traces if trace), [])
        (prompt,) = prompts
        image = self.served.image(prompt[BUDGET], prompt[SIZES][0])
        try:
            steps = read_steps(image.complete(trace), image.num_patches, image.pack)
            self.served.check_complete(steps, image, keep)
        except ValueError as error:
            raise TraceLostError(str(error)) from error
        return _Traced(reply, image, steps)

    def _budget(self, method: str | None, keep: int | None, trace_id: int) -> dict[str, Any]:
        """Fields of the chat that carry method, budget and trace id; without a method, a budget of all tokens."""
        served = self.served
        tower: dict[str, Any] = {TRACE: trace_id}
        decoder: dict[str, Any] = {TRACE: trace_id}
        if method is None:
            tower[KEEP] = served.tower.most_keep
            decoder[KEEP] = served.most + served.tower.shape.with_cls
        else:
            part = decoder if served.in_decoder else tower
            part[KEEP] = keep
            if method != served.method:
                part[METHOD] = method
        fields = {}
        if served.in_tower:
            fields["mm_processor_kwargs"] = tower
        if served.in_decoder:
            fields["vllm_xargs"] = decoder
        return fields

    def _measured(self, traced: _Traced, method: str | None) -> Measured:
        reply, image, steps = traced.reply, traced.image, traced.steps
        entering, last = self.served.visual_tokens(steps, image)
        return Measured(
            answer=reply.text,
            method=method,
            visual_tokens=entering,
            last_visual_tokens=last,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            ttft_seconds=reply.ttft_seconds,
            total_seconds=reply.total_seconds,
            kv_bytes=self.served.kv_bytes(reply.prompt_tokens, steps, image),
        )
