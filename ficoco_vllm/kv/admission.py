"""What a request may ask of the decoder, checked before it reaches the engine."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams
from vllm.v1.engine.input_processor import InputProcessor

from ficoco_vllm.compat import hook_processor_cache, note_sent
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.metrics.families import count_refusal
from ficoco_vllm.planning.server import decoder_planner
from ficoco_vllm.request_fields import KEEP, METHOD, TRACE, check_trace_id, find_unknown, unknown_field

# Attribute of vLLM's input processor, set in the API server where the budget follows the load; see `fill_budget`.
DEFAULT_KEEP = "ficoco_default_keep"
# The same, where the operator bounds what requests may ask for in `vllm_xargs`: called with these and the visual tokens
# of the request's largest image; raises ValueError. Every route of vLLM's goes through here.
BOUNDS = "ficoco_bounds"
# On the method that `hook_admission` puts in the place of vLLM's.
_HOOKED = "ficoco_admission"


def check_request(vllm_config: Any, request: Any) -> None:
    """Refuse what could not be answered rightly.

    Args:
        vllm_config: vLLM's configuration.
        request: vLLM's `EngineCoreRequest`.

    Raises:
        VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
    """
    config = FicocoConfig.of(vllm_config.model_config.hf_config)
    params = request.sampling_params
    if config.method is None or params is None:
        return
    extra_args = params.extra_args or {}
    if config.decoder_method is None:
        ours = sorted(key for key in extra_args if key.startswith("ficoco_"))
        if ours:
            raise VLLMValidationError(
                f"{ours[0]} in vllm_xargs is for methods of the decoder; "
                f"{config.method} works in the vision tower: send it in mm_processor_kwargs",
                parameter=ours[0],
            )
        return
    images = [
        (feature.mm_position.offset, feature.mm_position.length) for feature in request.mm_features or ()
    ]
    num_tokens = len(request.prompt_token_ids or ())
    try:
        unknown = find_unknown(extra_args, explain=config.explain)
        if unknown is not None:
            raise ValueError(unknown_field(unknown))
        if TRACE in extra_args:
            check_trace_id(extra_args[TRACE])
        plan = decoder_planner(vllm_config.model_config.hf_config).plan(num_tokens, images, extra_args)
    except ValueError as error:
        field = next((name for name in (KEEP, METHOD) if str(error).startswith(name)), None)
        raise VLLMValidationError(str(error), parameter=field) from error
    if not plan.reduces:
        return
    if request.resumable:
        raise VLLMValidationError(
            "a prompt that comes in pieces is not allowed where its visual tokens are reduced in the decoder, since "
            f"all of it decides which stay; allowed: the whole prompt at once, or {KEEP} = {images[0][1]}"
        )
    offset, length = plan.images[-1]
    if offset + length >= num_tokens:
        raise VLLMValidationError(
            "the prompt ends in an image; allowed: at least one token of text behind the last image, "
            "since the text decides which visual tokens stay"
        )
    if params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise VLLMValidationError(
            f"prompt_logprobs = {params.prompt_logprobs!r} is not allowed for a prompt whose visual tokens are "
            f"reduced in the decoder (nor echo with logprobs); allowed: none, or {KEEP} = {images[0][1]}",
            parameter="prompt_logprobs",
        )


def check_search(vllm_config: Any, params: Any) -> None:
    """Refuse a search by beams where the decoder reduces.

    vLLM sends each beam as a prompt of its own, with the tokens that it has found at the end, and without the request's
    `vllm_xargs`: the text behind the image, which decides what stays, would change from token to token.

    Args:
        vllm_config: vLLM's configuration.
        params: of the request.

    Raises:
        VLLMValidationError: it is one (HTTP 400).
    """
    if not isinstance(params, BeamSearchParams):
        return
    config = FicocoConfig.of(vllm_config.model_config.hf_config)
    if config.decoder_method is not None:
        raise VLLMValidationError(
            f"use_beam_search = True is not allowed where the decoder reduces ({config.method}); allowed: False, with "
            "n and temperature for several answers",
            parameter="use_beam_search",
        )


def fill_budget(default_keep: Callable[[str | None, int], int], request: Any) -> None:
    """Give a request with images a budget in the decoder if it names none.

    Args:
        default_keep: from the method that the request names, or None, and the visual tokens of its largest image as
            they enter the decoder, to the tokens that are left of each image in the last segment.
        request: vLLM's `EngineCoreRequest`; its sampling parameters are its own copy.
    """
    params = request.sampling_params
    if params is None or not request.mm_features:
        return
    extra_args = params.extra_args or {}
    if KEEP not in extra_args:
        most = max(feature.mm_position.length for feature in request.mm_features)
        params.extra_args = {**extra_args, KEEP: default_keep(extra_args.get(METHOD), most)}


def check_bounds(bounds: Callable[[Mapping[str, Any], int], None], request: Any) -> None:
    """Hold what a request asks of the decoder against the operator's bounds.

    Args:
        bounds: see `BOUNDS`.
        request: vLLM's `EngineCoreRequest`.

    Raises:
        VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
    """
    extra_args = request.sampling_params.extra_args if request.sampling_params else None
    most = max((feature.mm_position.length for feature in request.mm_features or ()), default=0)
    try:
        bounds(extra_args or {}, most)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error


def hook_admission() -> None:
    """Let vLLM's front end call `check_request` and `check_search`; may run many times.

    No hook of vLLM sees a request's prompt, its sampling parameters and the server's configuration together, so
    the method that turns them into the engine's request is wrapped. A search by beams asks about its watermarks first,
    where alone its parameters are seen as what they are.
    """
    hook_processor_cache()
    original = InputProcessor.process_inputs
    if hasattr(original, _HOOKED):  # or a wrapper of it, which takes its attributes over
        return

    @wraps(original)
    def process_inputs(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        default_keep, bounds = vars(self).get(DEFAULT_KEEP), vars(self).get(BOUNDS)
        if default_keep is not None:
            fill_budget(default_keep, request)
        try:
            if bounds is not None:
                check_bounds(bounds, request)
            check_request(self.vllm_config, request)
        except VLLMValidationError:
            count_refusal(self.vllm_config.model_config)
            raise
        note_sent(self.renderer.mm_processor_cache, args[1] if len(args) > 1 else kwargs["prompt"])
        return request

    setattr(process_inputs, _HOOKED, True)
    InputProcessor.process_inputs = process_inputs
    resolve = InputProcessor.resolve_watermarking

    @wraps(resolve)
    def resolve_watermarking(self: InputProcessor, params: Any) -> Any:
        try:
            check_search(self.vllm_config, params)
        except VLLMValidationError:
            count_refusal(self.vllm_config.model_config)
            raise
        return resolve(self, params)

    InputProcessor.resolve_watermarking = resolve_watermarking
