"""Application of the field `ficoco`: written where processor and decoder read it, with its effect recorded."""

import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

from vllm.exceptions import GenerationError, RetryableRequestError, VLLMValidationError

from ficoco_vllm.hooks.admission import FrontEnd, fill_defaults
from ficoco_vllm.hooks.api_server import hook_handlers, hook_prompts
from ficoco_vllm.hooks.unread_field import READ
from ficoco_vllm.kv.admission import ChatBudgets, visual_range
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.metrics.savings import Savings, SavingsPlanner
from ficoco_vllm.request_fields import (
    BUDGET,
    FIELD,
    KEEP,
    KEEP_RATIO,
    METHOD,
    QUESTION,
    SIZES,
    find_misplaced,
    misplaced,
)
from ficoco_vllm.server.request_field.question import first_turn, question_of
from ficoco_vllm.server.request_field.report import add_usage
from ficoco_vllm.server.request_field.resolve import Resolver
from ficoco_vllm.server.request_field.routes import HANDLERS
from ficoco_vllm.server.request_field.schema import OFF, FicocoRequest, FicocoUsage, parse

_PROCESSOR_FIELD, _DECODER_FIELD = "mm_processor_kwargs", "vllm_xargs"
# Fields that forbid tokens, and those that require an answer format.
_FORBIDDING = ("allowed_token_ids", "bad_words", "min_tokens")
_FORMS = ("structured_outputs", "response_format", "tools")
# Raised by vLLM for unexpected bodies, and answered with 500. Rendering depends on the body alone.
_RENDERING_ERRORS = (AssertionError, AttributeError, LookupError, RecursionError)


@dataclass
class RequestState:
    """State of one HTTP request.

    Attributes:
        requested: its field `ficoco`.
        savings: savings of each of its prompts with images.
        is_rendered: whether a prompt of it has been rendered, so that an error may be the server's.
    """

    requested: FicocoRequest | Literal["off"] | None
    savings: list[Savings] = field(default_factory=list)
    is_rendered: bool = False


# vLLM's handlers await the renderer in their own task, which finds the state of its request here.
_current: ContextVar[RequestState | None] = ContextVar("ficoco_request", default=None)


class FieldApplier:
    """Reads the field of all requests of one API server."""

    def __init__(
        self, resolver: Resolver, savings_planner: SavingsPlanner, segment_bytes: int, processor: Any
    ) -> None:
        """Serve one model.

        Args:
            resolver: translates the field into arguments of processor and decoder.
            savings_planner: computes the savings of a prompt.
            segment_bytes: KV cache of one token in one segment of layers.
            processor: vLLM's input processor, which holds the decoder's budget where that follows the load.
        """
        self.resolver = resolver
        self.savings_planner = savings_planner
        self.segment_bytes = segment_bytes
        self.processor = processor
        # Budget in the tower of requests that name none, where it moves: from the method that a request names to the
        # visual tokens of an image. Written into the request, since vLLM's threads do not know its class of traffic.
        self.default_tower: Callable[[str | None], int] | None = None
        decoder = resolver.plan.decoder
        self.keeps_windows = decoder is not None and decoder.config.windows == "turn"
        self.chats = ChatBudgets()

    def attach(self, state: Any) -> None:
        """Wrap vLLM's handlers and renderer.

        Args:
            state: application state of vLLM's server.
        """
        hook_handlers(state, {name: method for name, method, _ in HANDLERS}, self._handle)
        renderer = state.online_renderer
        setattr(renderer, READ, True)  # before the copy, which takes it over
        trusting = copy(renderer)
        trusting.trust_request_mm_kwargs = True
        hook_prompts(renderer, trusting, self._render)
        # Arguments of the decoder pass the input processor on every route, also where no prompt is rendered.
        FrontEnd.of(self.processor).bounds = partial(self.resolver.check_raw, _DECODER_FIELD)

    async def _handle(
        self, handler: Callable[..., Awaitable[Any]], request: Any, raw_request: Any = None
    ) -> Any:
        """Answer one request through vLLM's handler and report the applied method and budget."""
        try:
            state = RequestState(self._parse(request))
        except VLLMValidationError:
            self._count_refusal()
            raise
        token = _current.set(state)
        try:
            response = await handler(request, raw_request)
        except VLLMValidationError as error:
            raise _in_terms_of(state.requested, error) from error
        except GenerationError as error:
            forbidding = [name for name in _FORBIDDING if getattr(request, name, None)]
            has_form = any(getattr(request, name, None) for name in _FORMS)
            if isinstance(error, RetryableRequestError) or not (forbidding and has_form):
                raise
            raise _contradiction(forbidding) from error
        except _RENDERING_ERRORS as error:
            if state.is_rendered:
                raise
            raise _unrenderable(error) from error
        finally:
            _current.reset(token)
        usage = self._usage(state.savings)
        return response if usage is None else add_usage(response, usage, raw_request)

    def _parse(self, request: Any) -> FicocoRequest | Literal["off"] | None:
        """The field of a request's body, validated."""
        extra = request.model_extra or {}
        extensions = {name: getattr(request, name, None) for name in (_PROCESSOR_FIELD, _DECODER_FIELD)}
        path = find_misplaced(extra | extensions)
        if path is not None:
            raise VLLMValidationError(misplaced(path), parameter=path)
        _check_parts(getattr(request, "messages", None))
        return parse(extra.get(FIELD), self.resolver.allowed)

    async def _render(
        self,
        trusting: Callable[..., Awaitable[Any]],
        is_chat: bool,
        render: Callable[..., Awaitable[Any]],
        request: Any,
        messages: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Render the prompts of a request with its method and budget."""
        # Prompts without messages: their text is the question.
        chosen = trusting if self._apply(request, messages if is_chat else ()) else render
        try:
            rendered = await chosen(request, messages, *args, **kwargs)
        except _RENDERING_ERRORS as error:
            raise _unrenderable(error) from error
        state = _current.get()
        if state is not None:
            state.is_rendered = True
            # A chat comes with its messages.
            prompts = rendered[1] if isinstance(rendered, tuple) else rendered
            self._check_images(request, state, prompts)
            state.savings += filter(None, (self._savings_of(request, prompt) for prompt in prompts))
            self._check_echo(request, state)
        return rendered

    def _check_images(self, request: Any, state: RequestState, prompts: Sequence[Any]) -> None:
        """Refuse a share that keeps fewer tokens of one of the images than the operator allows."""
        if _mapping(request, _PROCESSOR_FIELD).get(KEEP_RATIO) is None:
            return
        name = f"{_PROCESSOR_FIELD}.{KEEP_RATIO}" if state.requested is None else f"{FIELD}.keep_ratio"
        try:
            for prompt in prompts:
                if BUDGET in prompt:
                    self.resolver.check_images(name, prompt[BUDGET], prompt[SIZES])
        except ValueError as error:
            self._count_refusal()
            raise VLLMValidationError(str(error), parameter=name) from error

    def _check_echo(self, request: Any, state: RequestState) -> None:
        """Refuse the echo of a prompt that the decoder reduces: vLLM takes it for a request of `prompt_logprobs`.

        Admission refuses these too, but by a name that the client has not sent.
        """
        if not getattr(request, "echo", False) or getattr(request, "prompt_logprobs", None) is not None:
            return
        # Tokens leave the decoder after its first segment.
        if any(prompt.missing[-1] > prompt.missing[0] for prompt in state.savings):
            self._count_refusal()
            raise VLLMValidationError(
                f"echo = True is not allowed for a prompt whose visual tokens are reduced in the decoder, since vLLM "
                f'answers it with log-probabilities of the whole prompt; allowed: False, or "{FIELD}": "{OFF}"',
                parameter="echo",
            )

    def _apply(self, request: Any, messages: Sequence[Any]) -> bool:
        """Write method and budget into the request, and the question where the method reads it.

        Returns:
            Whether its `mm_processor_kwargs` are ours alone, so that vLLM may trust them.
        """
        state = _current.get()
        raw, xargs = _mapping(request, _PROCESSOR_FIELD), _mapping(request, _DECODER_FIELD)
        extensions = ((_PROCESSOR_FIELD, raw), (_DECODER_FIELD, xargs))
        try:
            self.resolver.check_raw(_PROCESSOR_FIELD, raw)
            for name, values in extensions:
                self.resolver.bounds.check_reduces(f"{name}.{KEEP}", values.get(KEEP), self.resolver.max_keep)
            if state is None or state.requested is None:
                ours = self._default(raw, messages)
            else:
                for name, values in extensions:
                    for key in (KEEP, KEEP_RATIO, METHOD):
                        if key in values:
                            raise ValueError(
                                f"{name}.{key} together with {FIELD} is not allowed; allowed: one of them"
                            )
                resolved = self.resolver.resolve(state.requested)
                ours = dict(resolved.tower)
                if resolved.decoder:
                    request.vllm_xargs = {**xargs, **resolved.decoder}
        except ValueError as error:
            self._count_refusal()
            raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error
        tower = self.resolver.plan.tower
        method = ours.get(METHOD, raw.get(METHOD, tower.config.method))
        if QUESTION not in raw and tower.reads_question(method):
            question = question_of(messages)
            if question is not None:
                ours[QUESTION] = question
        if not ours:
            return False
        request.mm_processor_kwargs = {**raw, **ours}
        # The client's own are for vLLM to check.
        return not raw and not getattr(request, "media_io_kwargs", None)

    def _default(self, raw: Mapping[str, Any], messages: Sequence[Any]) -> dict[str, Any]:
        """The moving budget in the tower, for a request that names none; see `_apply`.

        Where the decoder caches windows, a chat keeps that of its first turn: an image with other tokens misses them.
        """
        choose = self.default_tower
        if choose is None or raw.keys() & {KEEP, KEEP_RATIO, METHOD}:
            return {}
        chat = first_turn(messages) if self.keeps_windows else None
        return {KEEP: self.chats.keep(chat, lambda: choose(None))}

    def _savings_of(self, request: Any, prompt: dict[str, Any]) -> Savings | None:
        """Savings of a rendered prompt; None without images."""
        places = (prompt.get("mm_placeholders") or {}).get("image", ())
        images = [visual_range(place) for place in places]
        if not images:
            return None
        extra_args = dict(_mapping(request, _DECODER_FIELD))
        try:
            if FrontEnd.of(self.processor).default_keep is not None and KEEP not in extra_args:
                # Fixed now, so that the response reports the budget that the decoder gets.
                extra_args[KEEP] = self._default_keep(prompt, extra_args)
                request.vllm_xargs = extra_args
            return self.savings_planner.of_prompt(prompt, images, extra_args)
        except ValueError:
            return None  # admission refuses the request with its own message

    def _default_keep(self, prompt: Mapping[str, Any], extra_args: Mapping[str, Any]) -> int:
        """Budget in the decoder that follows the load, as admission would choose it for this prompt."""
        names, places = prompt["mm_hashes"]["image"], prompt["mm_placeholders"]["image"]
        images = [
            SimpleNamespace(identifier=name, mm_position=place)
            for name, place in zip(names, places, strict=True)
        ]
        params = SimpleNamespace(extra_args=dict(extra_args))
        tokens = prompt.get("prompt_token_ids") or ()
        fill_defaults(
            self.processor,
            SimpleNamespace(prompt_token_ids=tokens, mm_features=images, sampling_params=params),
        )
        return int(params.extra_args[KEEP])

    def _usage(self, savings: list[Savings]) -> FicocoUsage | None:
        """The reported usage; None without visual tokens."""
        savings = [prompt for prompt in savings if prompt.visual_tokens_in]
        if not savings:
            return None
        return FicocoUsage(
            method=",".join(dict.fromkeys(prompt.method for prompt in savings)),
            visual_tokens=sum(prompt.visual_tokens_in for prompt in savings),
            visual_tokens_kept=sum(prompt.visual_tokens_kept for prompt in savings),
            kv_bytes_saved=sum(sum(prompt.missing) for prompt in savings) * self.segment_bytes,
        )

    def _count_refusal(self) -> None:
        count_refusal(self.processor.vllm_config.model_config)


def _mapping(request: Any, name: str) -> Mapping[str, Any]:
    """A field of the body; empty where it is not an object, as where a route does not declare it and vLLM drops it."""
    value = getattr(request, name, None)
    return value if isinstance(value, Mapping) else {}


def _check_parts(messages: Any) -> None:
    """Refuse parts of messages whose type is not a string: vLLM renders them, then fails."""
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for place, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and not isinstance(part.get("type", ""), str):
                path = f"messages[{number}].content[{place}].type"
                raise VLLMValidationError(
                    f"{path} = {part['type']!r} is not allowed; allowed: a string", parameter=path
                )


def _contradiction(fields: Sequence[str]) -> VLLMValidationError:
    """Error for a request whose form of the answer needs a token that it forbids.

    vLLM ends such a request when no token is left, and reports an internal error.
    """
    names = ", ".join(fields)
    return VLLMValidationError(
        f"{names} and the form of the answer contradict each other: no token is left; allowed: fields that leave the "
        "tokens with which an answer in this form is written",
        parameter=names,
    )


def _unrenderable(error: Exception) -> VLLMValidationError:
    return VLLMValidationError(
        f"the prompt cannot be rendered from this body: {error or type(error).__name__}"
    )


def _in_terms_of(
    requested: FicocoRequest | Literal["off"] | None, error: VLLMValidationError
) -> VLLMValidationError:
    """An error about the arguments of processor and decoder, in terms of the field from which we wrote them."""
    if not isinstance(requested, FicocoRequest):
        return error
    parameter, message = error.parameter, error.args[0]
    for ours, theirs in (
        (KEEP_RATIO, f"{FIELD}.keep_ratio"),
        (KEEP, f"{FIELD}.keep"),
        (METHOD, f"{FIELD}.method"),
    ):
        message = re.sub(rf"(?<![\w.]){ours}", theirs, message)  # not in `mm_processor_kwargs.ficoco_keep`
        parameter = theirs if parameter == ours else parameter
    return VLLMValidationError(message, parameter=parameter)
