"""What one HTTP request asks and what comes of it, noted where vLLM renders its prompts."""

from collections.abc import Mapping
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from vllm.exceptions import VLLMValidationError

from ficoco_vllm.hooks.unread_field import READ
from ficoco_vllm.kv.admission import BOUNDS, DEFAULT_KEEP
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.metrics.savings import Account, Accountant
from ficoco_vllm.processing import BUDGET, SIZES
from ficoco_vllm.request_fields import KEEP, METHOD
from ficoco_vllm.server.request_field.resolve import Resolver
from ficoco_vllm.server.request_field.schema import FIELD, FicocoRequest, FicocoUsage, parse

# The handlers of vLLM's routes await the renderer in their own task, so it finds the request's ledger here.
current: ContextVar["Ledger | None"] = ContextVar("ficoco_ledger", default=None)


@dataclass
class Ledger:
    """Of one HTTP request.

    Attributes:
        asked: its field `ficoco`.
        segment_bytes: KV cache of one token in one segment of layers.
        accounts: of its prompts with images.
    """

    asked: FicocoRequest | Literal["off"] | None
    segment_bytes: int
    accounts: list[Account] = field(default_factory=list)

    def usage(self) -> FicocoUsage | None:
        """What the answer tells; nothing where there is no image."""
        accounts = [account for account in self.accounts if account.visual_tokens_in]
        if not accounts:
            return None
        return FicocoUsage(
            method=",".join(dict.fromkeys(account.method for account in accounts)),
            visual_tokens=sum(account.visual_tokens_in for account in accounts),
            visual_tokens_kept=sum(account.visual_tokens_kept for account in accounts),
            kv_bytes_saved=sum(sum(account.missing) for account in accounts) * self.segment_bytes,
        )


class Control:
    """Of one API server: tells processor and decoder what its requests ask, and notes what comes of it."""

    def __init__(
        self, resolver: Resolver, accountant: Accountant, segment_bytes: int, processor: Any
    ) -> None:
        """Control one server.

        Args:
            resolver: from what a request asks to what is told.
            accountant: knows what a prompt saves.
            segment_bytes: see `Ledger`.
            processor: vLLM's input processor, which knows the decoder's budget where it follows the load.
        """
        self.resolver = resolver
        self.accountant = accountant
        self.segment_bytes = segment_bytes
        self.processor = processor

    def open(self, request: Any) -> Ledger:
        """Read the request's field.

        Args:
            request: a body of vLLM's OpenAI routes.

        Raises:
            VLLMValidationError: it is not allowed.
        """
        try:
            asked = parse((request.model_extra or {}).get(FIELD))
        except VLLMValidationError:
            self._count_refusal()
            raise
        return Ledger(asked, self.segment_bytes)

    def attach(self, renderer: Any) -> None:
        """Stand between the routes and a renderer.

        Args:
            renderer: vLLM's `OnlineRenderer`; all of its routes render chats and completions through two methods.
        """
        # What goes to the decoder passes one place on all routes, those included that render no prompt.
        setattr(self.processor, BOUNDS, partial(self.resolver.check_raw, "vllm_xargs"))
        setattr(renderer, READ, True)
        trusting = copy(renderer)
        trusting.trust_request_mm_kwargs = True
        chat, completion = renderer.preprocess_chat, renderer.preprocess_cmpl

        async def preprocess_chat(request: Any, *args: Any, **kwargs: Any) -> Any:
            ours = self._tell(request)
            render = trusting.preprocess_chat if ours else chat
            messages, inputs = await render(request, *args, **kwargs)
            self._note(request, inputs)
            return messages, inputs

        async def preprocess_cmpl(request: Any, *args: Any, **kwargs: Any) -> Any:
            ours = self._tell(request)
            inputs = await (trusting.preprocess_cmpl if ours else completion)(request, *args, **kwargs)
            self._note(request, inputs)
            return inputs

        renderer.preprocess_chat, renderer.preprocess_cmpl = preprocess_chat, preprocess_cmpl

    def _tell(self, request: Any) -> bool:
        """Write our fields into the request.

        Returns:
            Whether its `mm_processor_kwargs` are ours alone, so that vLLM may trust them.
        """
        ledger = current.get()
        raw, xargs = getattr(request, "mm_processor_kwargs", None), getattr(request, "vllm_xargs", None)
        try:
            self.resolver.check_raw("mm_processor_kwargs", raw or {})
            for name, values in (("mm_processor_kwargs", raw), ("vllm_xargs", xargs)):
                keep = (values or {}).get(KEEP)
                self.resolver.bounds.check_reduced(f"{name}.{KEEP}", keep, self.resolver.most)
            if ledger is None or ledger.asked is None:
                return False
            for name, values in (("mm_processor_kwargs", raw), ("vllm_xargs", xargs)):
                twice = sorted({KEEP, METHOD} & set(values or {}))
                if twice:
                    raise ValueError(f"{name}.{twice[0]} beside {FIELD} is not allowed; allowed: one of them")
            told = self.resolver.tell(ledger.asked)
        except ValueError as error:
            self._count_refusal()
            raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error
        if told.decoder:
            request.vllm_xargs = {**(xargs or {}), **told.decoder}
        if not told.tower:
            return False
        if raw or getattr(request, "media_io_kwargs", None):
            request.mm_processor_kwargs = {**(raw or {}), **told.tower}
            return False  # the client's own are vLLM's to judge
        request.mm_processor_kwargs = dict(told.tower)
        return True

    def _count_refusal(self) -> None:
        count_refusal(self.processor.vllm_config.model_config)

    def _note(self, request: Any, inputs: list[Mapping[str, Any]]) -> None:
        ledger = current.get()
        if ledger is None:
            return
        for prompt in inputs:
            images = [
                (place.offset, place.length)
                for place in (prompt.get("mm_placeholders") or {}).get("image", ())
            ]
            if not images:
                continue
            extra_args = dict(getattr(request, "vllm_xargs", None) or {})
            default_keep = vars(self.processor).get(DEFAULT_KEEP)
            if default_keep is not None and KEEP not in extra_args:
                # Asked here, so that the answer tells the budget that the decoder gets.
                most = max(length for _, length in images)
                extra_args[KEEP] = default_keep(extra_args.get(METHOD), most)
                request.vllm_xargs = extra_args
            num_tokens = len(prompt.get("prompt_token_ids") or ())
            try:
                account = self.accountant.account(
                    num_tokens, images, prompt.get(BUDGET), extra_args, prompt.get(SIZES, ())
                )
            except ValueError:
                continue  # refused when the engine's request is made, with a message of its own
            ledger.accounts.append(account)
