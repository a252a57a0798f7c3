"""Explanation of a request: the chat with and without reduction, and the trace of the former."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.hooks.api_server import hook_chats
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.request_fields import BUDGET, FIELD, KEEP, MAX_TRACE_ID, METHOD, SIZES, TRACE
from ficoco_vllm.server.explain.chat import Reply, send_chat
from ficoco_vllm.server.explain.pages import examples
from ficoco_vllm.server.explain.schema import ExplainRequest, Explanation, Measured, Options
from ficoco_vllm.server.explain.served_model import ServedModel
from ficoco_vllm.server.explain.views import TracedImage
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds, Resolved, Resolver
from ficoco_vllm.server.request_field.schema import OFF, FicocoRequest
from ficoco_vllm.tracing.chain import Step, read_steps

# A worker only returns recorded data; one that takes longer is not responding.
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

    hook_chats(renderer, record)
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
        self.engine_client = engine_client
        # A copy of its own: requests of clients go through wrappers that the original gets later.
        self.chat = copy(chat)
        self.chat.online_renderer = copy(chat.online_renderer)
        self.served = ServedModel.of(engine_client.vllm_config)
        plan = ServerPlan.served(engine_client.model_config.hf_config)
        self.resolver = Resolver(plan, bounds)
        self._whole = Resolver(plan, UNBOUNDED).resolve(OFF)
        self._is_warm = False
        self._limit = asyncio.Semaphore(MAX_CONCURRENT)

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        return str(self.chat.models.base_model_paths[0].name)

    def options(self) -> Options:
        """Choices for the page."""
        served, bounds, plan = self.served, self.resolver.bounds, self.resolver.plan
        return Options(
            model=self.model,
            methods=[choice for choice in served.methods if choice.name in self.resolver.methods],
            method=served.method,
            keep=served.keep,
            min_keep=bounds.min_keep,
            max_keep=served.most,
            grid=served.tower.shape.grid,
            keep_per="image"
            if served.in_decoder or served.tower.shape.tiling is None or served.tower.shape.tiling.dynamic
            else plan.config.keep_per,
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
        reduced, whole = self._resolve(request), self._whole
        if not self._is_warm:
            # The first run of each kind on a server takes longer and must not be measured.
            short = request.model_copy(update={"max_tokens": 1})
            await self._chat(short, raw_request, reduced)
            await self._chat(short, raw_request, whole)
            self._is_warm = True
        full = None
        if request.compare:
            full = self._measured(await self._chat(request, raw_request, whole), None)
        traced = await self._chat(request, raw_request, reduced)
        if keep is None:
            _, keep = self.served.visual_tokens(traced.steps, traced.image)
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

    def _resolve(self, request: ExplainRequest) -> Resolved:
        """Method and budget of a request, as the field `ficoco` of a chat would set them.

        Raises:
            VLLMValidationError: they are not allowed.
        """
        served = self.served
        try:
            if request.method in CONTROLS:
                raise ValueError(
                    f"method = {request.method!r} is not allowed, since there is no reduction to explain; allowed: "
                    + ", ".join(choice.name for choice in served.methods)
                )
            resolved = self.resolver.resolve(FicocoRequest(method=request.method, keep=request.keep))
        except ValueError as error:
            count_refusal(self.engine_client.model_config)
            message = str(error).removeprefix(f"{FIELD}.")
            raise VLLMValidationError(message, parameter=message.split(" ", 1)[0]) from error
        # The server's budget is written down, as another one may follow the load; one that follows the size of the
        # image is left to processor and decoder.
        default: dict[str, Any] = {} if served.keep is None else {KEEP: served.keep}
        if served.in_decoder:
            return replace(resolved, decoder=default | dict(resolved.decoder))
        return replace(resolved, tower=default | dict(resolved.tower))

    async def _chat(self, request: ExplainRequest, raw_request: Any, resolved: Resolved) -> _Traced:
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
                **self._fields(resolved, trace_id),
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
            self.served.check_complete(steps, image, self._expected(resolved, image))
        except ValueError as error:
            raise TraceLostError(str(error)) from error
        return _Traced(reply, image, steps)

    def _expected(self, resolved: Resolved, image: TracedImage) -> int | None:
        """Visual tokens in the decoder's last layer by plan; None where the decoder does not reduce."""
        decoder = self.resolver.plan.decoder
        if decoder is None:
            return None
        entering, keep = image.num_entering, resolved.decoder.get(KEEP)
        keep = decoder.keep_of(entering) if keep is None else keep
        return decoder.counts(resolved.decoder.get(METHOD, decoder.method), entering, keep)[-1]

    def _fields(self, resolved: Resolved, trace_id: int) -> dict[str, Any]:
        """Fields of the chat that carry method, budget and trace id."""
        mark = {TRACE: trace_id}
        fields = {}
        if self.served.in_tower:
            fields["mm_processor_kwargs"] = mark | dict(resolved.tower)
        if self.served.in_decoder:
            fields["vllm_xargs"] = mark | dict(resolved.decoder)
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
