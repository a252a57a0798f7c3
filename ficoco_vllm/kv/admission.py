"""Checks of a request's decoder settings before it reaches the engine."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import decoder_planner
from ficoco_vllm.planning.windows import find_ends
from ficoco_vllm.request_fields import (
    KEEP,
    METHOD,
    PREFIX,
    TRACE,
    WINDOW,
    as_integer,
    check_trace_id,
    find_unknown,
    unknown_field,
)


def images_of(request: Any, *, videos: bool = True) -> list[tuple[int, int]]:
    """Offset in the prompt and number of tokens of each image.

    Args:
        request: object of vLLM's front end, scheduler or worker with `mm_features`.
        videos: whether videos count as images, as they do for the decoder, which keeps them whole.
    """
    features = [feature for feature in request.mm_features or () if videos or feature.modality == "image"]
    return [visual_range(feature.mm_position) for feature in features]


def visual_range(position: Any) -> tuple[int, int]:
    """Offset and number of the visual tokens of an image, without the tokens that some models put around them.

    Args:
        position: vLLM's placeholder range.
    """
    embeds = getattr(position, "is_embed", None)
    if embeds is None:
        return position.offset, position.length
    return position.offset + int(embeds.int().argmax()), int(embeds.sum())


def check_request(vllm_config: Any, request: Any) -> None:
    """Refuse requests that a reducing decoder cannot answer correctly.

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
        ours = sorted(key for key in extra_args if key.startswith(PREFIX))
        if ours:
            raise VLLMValidationError(
                f"{ours[0]} in vllm_xargs is for methods of the decoder; "
                f"{config.method} works in the vision tower: send {KEEP} and {METHOD} in mm_processor_kwargs",
                parameter=ours[0],
            )
        return
    images = images_of(request)
    num_tokens = len(request.prompt_token_ids or ())
    try:
        windows = config.windows == "turn"
        unknown = find_unknown(extra_args, explain=config.explain, windows=windows)
        if unknown is not None:
            raise ValueError(unknown_field(unknown))
        if TRACE in extra_args:
            check_trace_id(extra_args[TRACE])
            # A cached window is not reduced again, so it would leave no trace.
            params.skip_reading_prefix_cache = True
        planner = decoder_planner(vllm_config.model_config.hf_config)
        plan = planner.plan(num_tokens, images, extra_args)
        planner.check_windows(plan)
    except ValueError as error:
        field = next((name for name in (KEEP, METHOD, WINDOW) if str(error).startswith(name)), None)
        raise VLLMValidationError(str(error), parameter=field) from error
    if KEEP in extra_args:  # the engine's messages cannot carry NumPy integers
        params.extra_args = {**extra_args, KEEP: as_integer(extra_args[KEEP])}
    if not plan.reduces:
        return
    if any(feature.modality != "image" for feature in request.mm_features):
        raise VLLMValidationError(
            "a video is not allowed where visual tokens are reduced in the decoder, since there is text between "
            f"its frames; allowed: images, or {KEEP} = {max(length for _, length in images)}"
        )
    if request.resumable:
        raise VLLMValidationError(
            "a prompt that arrives in pieces is not allowed where its visual tokens are reduced in the decoder, since "
            f"all of it decides which stay; allowed: a whole prompt, or {KEEP} = {images[0][1]}"
        )
    offset, length = plan.images[-1]
    if offset + length >= num_tokens:
        raise VLLMValidationError(
            "the prompt ends in an image; allowed: at least one token of text after the last image, "
            "since the text decides which visual tokens stay"
        )
    if params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None:
        raise VLLMValidationError(
            f"prompt_logprobs = {params.prompt_logprobs!r} is not allowed for a prompt whose visual tokens are "
            f"reduced in the decoder (nor echo with logprobs); allowed: none, or {KEEP} = {images[0][1]}",
            parameter="prompt_logprobs",
        )


def check_stop(request: Any) -> None:
    """Refuse stop strings that cannot be sent to the engine: JSON can contain half of a surrogate pair.

    Args:
        request: vLLM's `EngineCoreRequest`.

    Raises:
        VLLMValidationError: naming the field (HTTP 400).
    """
    stop = getattr(request.sampling_params, "stop", None) or ()
    try:
        "".join(stop).encode()
    except UnicodeEncodeError as error:
        raise VLLMValidationError(
            f"stop cannot be encoded as UTF-8: {error.reason}", parameter="stop"
        ) from error


def check_search(vllm_config: Any, params: Any) -> None:
    """Refuse beam search where the decoder reduces.

    vLLM sends each beam as a separate prompt that ends in the tokens generated so far, and without the request's
    `vllm_xargs`: the text after the image, which decides which tokens stay, would change from token to token.

    Args:
        vllm_config: vLLM's configuration.
        params: sampling parameters of the request.

    Raises:
        VLLMValidationError: it is a beam search (HTTP 400).
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


def fill_windows(config: FicocoConfig, marker: Sequence[int], request: Any) -> None:
    """Give a request with images the ends of its decision windows if it names none.

    Scheduler and workers read them there, so that all compute the same plan.

    Args:
        config: settings of the server.
        marker: tokens of the chat template's generation prompt.
        request: vLLM's `EngineCoreRequest`; its sampling parameters are its own copy.
    """
    params = request.sampling_params
    if config.windows != "turn" or params is None or not request.mm_features:
        return
    extra_args = params.extra_args or {}
    if WINDOW not in extra_args:
        ends = find_ends(
            request.prompt_token_ids or (), sorted(images_of(request)), marker, config.window_tokens
        )
        params.extra_args = {**extra_args, WINDOW: ends}


class ChatBudgets:
    """Budgets that were chosen for the first turns of chats, which later turns keep.

    The budget is part of the hash of a cached window, so a budget that changed from turn to turn would never hit it.
    """

    def __init__(self, most: int = 4096) -> None:
        """Remember `most` chats, the latest ones."""
        self.most = most
        self.keeps: OrderedDict[bytes, int] = OrderedDict()

    def keep(self, name: bytes | None, choose: Callable[[], int]) -> int:
        """The budget of a request's chat.

        Args:
            name: name of the chat, by its first turn; None for a request without one.
            choose: returns the budget of a new chat.
        """
        if name is None:
            return choose()
        keep = self.keeps.pop(name, None)
        self.keeps[name] = choose() if keep is None else keep
        while len(self.keeps) > self.most:
            self.keeps.popitem(last=False)
        return self.keeps[name]


def _first_window(request: Any) -> bytes | None:
    """Digest of a request's first decision window, with what is before it."""
    extra_args = request.sampling_params.extra_args or {}
    ends = extra_args.get(WINDOW)
    if not isinstance(ends, list) or not ends:
        return None
    tokens = np.asarray(request.prompt_token_ids[: int(ends[0])], dtype=np.int64)
    images = [feature.identifier for feature in request.mm_features]
    first = [name for name, (offset, _) in zip(images, images_of(request), strict=True) if offset < ends[0]]
    return hashlib.sha256(repr((extra_args.get(METHOD), first)).encode() + tokens.tobytes()).digest()


def fill_budget(default_keep: Callable[[str | None, int], int], chats: ChatBudgets, request: Any) -> None:
    """Give a request with images a budget in the decoder if it names none.

    Args:
        default_keep: from the method that the request names, or None, and the visual tokens of its largest image as
            they enter the decoder, to the tokens that are left of each image in the last segment.
        chats: budgets of earlier turns.
        request: vLLM's `EngineCoreRequest`, with the ends of its windows; its sampling parameters are its own copy.
    """
    params = request.sampling_params
    if params is None or not request.mm_features:
        return
    extra_args = params.extra_args or {}
    if KEEP not in extra_args:
        most = max(length for _, length in images_of(request))
        keep = chats.keep(_first_window(request), lambda: default_keep(extra_args.get(METHOD), most))
        params.extra_args = {**extra_args, KEEP: keep}


def check_bounds(bounds: Callable[[Mapping[str, Any], int], None], request: Any) -> None:
    """Check a request's decoder settings against the operator's bounds.

    Args:
        bounds: called with the request's `vllm_xargs` and the visual tokens of its largest image; raises ValueError.
        request: vLLM's `EngineCoreRequest`.

    Raises:
        VLLMValidationError: naming the field, its value and what is allowed (HTTP 400).
    """
    extra_args = request.sampling_params.extra_args if request.sampling_params else None
    most = max((length for _, length in images_of(request)), default=0)
    try:
        bounds(extra_args or {}, most)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter=str(error).split(" ", 1)[0]) from error
