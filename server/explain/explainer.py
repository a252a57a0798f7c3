"""Answers one explanation: the chat with and without reduction, and the trace of the first."""

import asyncio
import secrets
from copy import copy
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.request_fields import KEEP, MAX_TRACE_ID, METHOD, TRACE
from ficoco_vllm.server.explain.asking import Reply, ask
from ficoco_vllm.server.explain.facts import Facts
from ficoco_vllm.server.explain.schema import ExplainRequest, Explanation, Measured, Options
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Bounds
from ficoco_vllm.tracing.chain import Step, read_steps

# Of a worker; it only hands over what is recorded, so what takes longer is a worker that does not answer.
_RPC_SECONDS = 60.0
# Explanations that run at once in this process; the others wait. Each has one trace, of the few that a worker holds.
MAX_AT_ONCE = 2


class TraceLostError(RuntimeError):
    """A trace was not whole when it was fetched."""


def trusting(chat: Any) -> Any:
    """The chat handler of vLLM for chats of our own making: it takes our keyword arguments of the image processor.

    Clients never reach it; what they may send to the chat route stays as the operator chose.

    Args:
        chat: vLLM's `OpenAIServingChat`.
    """
    ours, renderer = copy(chat), copy(chat.online_renderer)
    renderer.trust_request_mm_kwargs = True
    ours.online_renderer = renderer
    return ours


class Explainer:
    """Of one API server.

    Everything a client may send goes through the handler of vLLM's chat route: its loader of images, its limits, its
    errors.
    """

    def __init__(self, engine_client: Any, chat: Any, bounds: Bounds = UNBOUNDED) -> None:
        """Look at the served model.

        Args:
            engine_client: vLLM's.
            chat: vLLM's `OpenAIServingChat`.
            bounds: of the operator, for the side with reduction; the other one always keeps all tokens.
        """
        self.bounds = bounds
        self.engine_client = engine_client
        self.chat = trusting(chat)
        self.facts = Facts.of(engine_client.vllm_config)
        self._is_warm = False
        self._few_at_once = asyncio.Semaphore(MAX_AT_ONCE)

    @property
    def model(self) -> str:
        """Name under which the model is served."""
        return str(self.chat.models.base_model_paths[0].name)

    def options(self) -> Options:
        """What the page offers."""
        facts = self.facts
        return Options(
            model=self.model,
            methods=[choice for choice in facts.methods if self._allows(choice.name)],
            method=facts.method,
            keep=facts.keep,
            min_keep=self.bounds.min_keep,
            max_keep=facts.shape.num_patches,
            grid=facts.shape.grid,
        )

    def _allows(self, method: str) -> bool:
        return self.bounds.methods is None or method in self.bounds.methods

    async def explain(self, asked: ExplainRequest, raw_request: Any) -> Explanation:
        """Ask, with reduction and without, and tell what the reduction did.

        Args:
            asked: by the client.
            raw_request: of the client.

        Raises:
            RefusedError: vLLM answered with an error.
            TraceLostError: other requests have taken the place of the trace.
            VLLMValidationError: the request is not allowed.
        """
        async with self._few_at_once:
            return await self._explain(asked, raw_request)

    async def _explain(self, asked: ExplainRequest, raw_request: Any) -> Explanation:
        method = asked.method or self.facts.method
        keep = self.facts.keep if asked.keep is None else asked.keep
        try:
            if asked.method is not None:
                self.bounds.check_method("method", asked.method)
            # What no server allows is refused by the planners, in words of theirs.
            if asked.keep is not None and 1 <= asked.keep < self.bounds.min_keep:
                self.bounds.check_keep("keep", asked.keep, self.facts.shape.num_patches)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error
        if not self._is_warm:
            # Whatever a server does for the first time takes longer; neither side is to pay for it.
            short = asked.model_copy(update={"max_tokens": 1})
            await self._ask(short, raw_request, method, keep)
            await self._ask(short, raw_request, None, None)
            self._is_warm = True
        full = None
        if asked.compare:
            full_reply, none = await self._ask(asked, raw_request, None, None)
            full = self._measured(full_reply, none, None)
        reply, steps = await self._ask(asked, raw_request, method, keep)
        layers, destinations = Explanation.story(steps)
        return Explanation(
            model=self.model,
            question=asked.question,
            method=method,
            keep=keep,
            grid=self.facts.shape.grid,
            central_square=self.facts.central_square,
            reduced=self._measured(reply, steps, method),
            full=full,
            layers=layers,
            destinations=destinations,
        )

    async def _ask(
        self, asked: ExplainRequest, raw_request: Any, method: str | None, keep: int | None
    ) -> tuple[Reply, list[Step]]:
        """One chat. It carries a mark that no other has, so no cache knows its image, also without reduction."""
        trace_id = secrets.randbelow(MAX_TRACE_ID)
        chat = ChatCompletionRequest.model_validate(
            {
                "model": self.model,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": asked.image}},
                            {"type": "text", "text": asked.question},
                        ],
                    }
                ],
                "temperature": 0,
                "max_tokens": asked.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._budget(method, keep, trace_id),
            }
        )
        try:
            reply = await ask(self.chat, chat, raw_request)
        finally:
            # Fetched whatever happened, so that nothing stays in the workers.
            traces = await self.engine_client.collective_rpc(
                "ficoco_take_trace", timeout=_RPC_SECONDS, args=(trace_id,)
            )
        # Every worker that holds a part of a layer has seen the same.
        trace: list[dict[str, Any]] = next((trace for trace in traces if trace), [])
        try:
            steps = read_steps(trace, self.facts.shape.num_patches)
            self.facts.check_complete(steps, keep)
        except ValueError as error:
            raise TraceLostError(str(error)) from error
        return reply, steps

    def _budget(self, method: str | None, keep: int | None, trace_id: int) -> dict[str, Any]:
        """What the chat says of the reduction; without a method, that there is none."""
        facts = self.facts
        tower: dict[str, Any] = {TRACE: trace_id}
        decoder: dict[str, Any] = {TRACE: trace_id}
        if method is None:
            tower[KEEP] = facts.shape.num_patches
            decoder[KEEP] = facts.shape.num_patches + facts.shape.with_cls
        else:
            part = decoder if facts.in_decoder else tower
            part[KEEP] = keep
            if method != facts.method:
                part[METHOD] = method
        fields = {}
        if facts.in_tower:
            fields["mm_processor_kwargs"] = tower
        if facts.in_decoder:
            fields["vllm_xargs"] = decoder
        return fields

    def _measured(self, reply: Reply, steps: list[Step], method: str | None) -> Measured:
        entering, last = self.facts.visual_tokens(steps)
        return Measured(
            answer=reply.text,
            method=method,
            visual_tokens=entering,
            last_visual_tokens=last,
            prompt_tokens=reply.prompt_tokens,
            completion_tokens=reply.completion_tokens,
            ttft_seconds=reply.ttft_seconds,
            total_seconds=reply.total_seconds,
            kv_bytes=self.facts.kv_bytes(reply.prompt_tokens, steps),
        )
