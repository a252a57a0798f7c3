"""Admission: each request is checked, gets its budget and is registered with the metrics before it goes to the engine.

No hook of vLLM sees a request's prompt, its sampling parameters and the server's configuration together, so the method
that turns them into the engine's request is wrapped. Beam search resolves its watermarks first; only that method
receives its parameters unchanged.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.base import BaseRenderer
from vllm.v1.engine.input_processor import InputProcessor

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hooks.processor_cache import hook_processor_cache, note_sent
from ficoco_vllm.hooks.sampling_limits import check_limits
from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.kv.admission import (
    ChatBudgets,
    check_bounds,
    check_request,
    check_search,
    check_stop,
    fill_budget,
    fill_windows,
    images_of,
)
from ficoco_vllm.kv.marker import generation_prompt
from ficoco_vllm.metrics.counting import RequestCounter
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.request_fields import BUDGET

# Tokens of the generation prompt, on vLLM's renderer.
_MARKER = "ficoco_generation_prompt"


@dataclass
class FrontEnd:
    """State of one front end of vLLM's, on its input processor.

    Attributes:
        counter: counts its requests; None where nothing is counted.
        default_keep: budget in the decoder of requests that name none, where it follows the load; see `fill_budget`.
        bounds: the operator's bounds on `vllm_xargs`; see `check_bounds`.
        chats: budgets of earlier turns.
    """

    counter: RequestCounter | None
    default_keep: Callable[[str | None, int], int] | None = None
    bounds: Callable[[Mapping[str, Any], int], None] | None = None
    chats: ChatBudgets = field(default_factory=ChatBudgets)

    @classmethod
    def of(cls, processor: Any) -> "FrontEnd":
        """The state of vLLM's `InputProcessor`, made on first use."""
        if "ficoco" not in vars(processor):
            processor.ficoco = cls(RequestCounter.of(processor.vllm_config))
        state: FrontEnd = processor.ficoco
        return state


def fill_defaults(processor: Any, request: Any) -> None:
    """Give a request with images the ends of its windows and, where that follows the load, its budget in the decoder.

    Args:
        processor: vLLM's input processor.
        request: vLLM's `EngineCoreRequest`, or an object with its prompt, images and sampling parameters.
    """
    config, state = FicocoConfig.of(processor.vllm_config.model_config.hf_config), FrontEnd.of(processor)
    fill_windows(config, getattr(processor.renderer, _MARKER, ()), request)
    if state.default_keep is not None:
        fill_budget(state.default_keep, state.chats, request)


def hook_admission() -> None:
    """Make vLLM's front end admit requests through `_process_inputs` and `_resolve_watermarking`. Idempotent."""
    hook_processor_cache()
    wrap(InputProcessor, "process_inputs", _process_inputs)
    wrap(InputProcessor, "resolve_watermarking", _resolve_watermarking)
    wrap(BaseRenderer, "warmup", _warmup)


def _process_inputs(original: Any, self: Any, request_id: str, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(self, request_id, prompt, *args, **kwargs)
    state = FrontEnd.of(self)
    with _refusals_counted(self):
        fill_defaults(self, request)
        check_stop(request)
        if state.bounds is not None:
            check_bounds(state.bounds, request)
        check_request(self.vllm_config, request)
        if self.vllm_config.use_v2_model_runner and request.sampling_params is not None:
            check_limits(request.sampling_params, len(request.prompt_token_ids or ()))
    note_sent(self.renderer.mm_processor_cache, prompt)
    params = request.sampling_params
    if state.counter is not None and params is not None:
        # A prompt of another kind, which vLLM renders only now, carries no budget.
        is_ours = isinstance(prompt, dict) and BUDGET in prompt
        rendered = prompt if is_ours else {"prompt_token_ids": request.prompt_token_ids}
        # The parameters are the request's own copy; children of a request with several answers share them.
        params.ficoco = state.counter.request(rendered, images_of(request, videos=False), params.extra_args)
    return request


def _warmup(original: Any, self: Any, chat_params: Any) -> Any:
    """Store the generation prompt of the server's chat template, which ends turns."""
    result = original(self, chat_params)
    if FicocoConfig.of(self.model_config.hf_config).windows == "turn":
        setattr(self, _MARKER, generation_prompt(self, chat_params))
    return result


def _resolve_watermarking(original: Any, self: Any, params: Any) -> Any:
    with _refusals_counted(self):
        check_search(self.vllm_config, params)
    return original(self, params)


@contextmanager
def _refusals_counted(processor: Any) -> Iterator[None]:
    try:
        yield
    except VLLMValidationError:
        count_refusal(processor.vllm_config.model_config)
        raise
