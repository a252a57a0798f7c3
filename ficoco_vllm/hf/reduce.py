"""Apply a reduction to a model, and remove it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from ficoco_vllm.config import DEFAULT_METHOD, FicocoConfig
from ficoco_vllm.decoder.layers import why_not_reducible
from ficoco_vllm.hf.counts import Reduction, TokenCounts
from ficoco_vllm.hf.reduced_model import ReducedModel
from ficoco_vllm.planning.server import ServerPlan

MODELS = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
# Its `generate` encodes images once, and its masks follow the length of a layer's cache.
OLDEST = (5, 19)
# Server settings that do not apply here.
_OF_SERVERS = ("metrics", "explain", "graph_budgets", "text_encoder")
_ATTRIBUTE = "_ficoco"
_applying = Lock()


@contextmanager
def reduce_tokens(
    model: Any, method: str = DEFAULT_METHOD, keep: int | None = None, **settings: Any
) -> Iterator[Reduction]:
    """Reduce the visual tokens of a model within a block; see `apply`.

    with reduce_tokens(model, method="ficoco-v", keep=64) as reduction:
        answer = model.generate(**inputs)
    print(reduction.tokens)
    """
    reduction = apply(model, method, keep, **settings)
    try:
        yield reduction
    finally:
        remove(model)


def apply(model: Any, method: str = DEFAULT_METHOD, keep: int | None = None, **settings: Any) -> Reduction:
    """Reduce the visual tokens of a model until `remove` is called.

    `generate` and the model itself take the same arguments as before, and what `generate` returns begins with the
    caller's `input_ids`. Weights stay as they are.

    Args:
        model: `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` of transformers, as it is or with
            adapters of peft.
        method: name of a method of the tower, of the decoder or of both.
        keep: visual tokens of an image after the reduction, of each tile for LLaVA-NeXT; None means a ninth.
        **settings: those of `--ficoco-config`: hyperparameters of the method, `keep_per`, `kv_budget`, `num_segments`,
            `encoder` and `backend`.

    Returns:
        The reduction, whose token counts are updated with every prompt.

    Raises:
        ValueError: the model is not known or already reduced, or the settings do not fit it.
    """
    inner = _inner(model)
    for name in _OF_SERVERS:
        if name in settings:
            raise ValueError(f"{name} is a setting of the server; it is not allowed here")
    config = FicocoConfig.parse({"method": method, "keep": keep, **settings})
    plan = ServerPlan.of(config, inner.config)
    _check_device(inner.vision_tower, "the vision tower")
    if plan.decoder is not None:
        _check_decoder(inner.config, method)
        _check_device(inner.language_model, f"the language model, in which {method} reduces")
    with _applying:
        applied: ReducedModel | None = vars(inner).get(_ATTRIBUTE)
        if applied is not None:
            raise ValueError(
                f"the model is already reduced, by {applied.reduction.method}; call ficoco_vllm.hf.remove(model) first"
            )
        reduced = ReducedModel(inner, Reduction(method, plan, TokenCounts()))
        reduced.install()
        setattr(inner, _ATTRIBUTE, reduced)
    return reduced.reduction


def remove(model: Any) -> None:
    """Restore the model's own methods.

    Raises:
        ValueError: the model is not reduced.
        RuntimeError: its methods have been replaced again since.
    """
    inner = _inner(model)
    with _applying:
        applied: ReducedModel | None = vars(inner).get(_ATTRIBUTE)
        if applied is None:
            raise ValueError("the model is not reduced")
        applied.uninstall()
        delattr(inner, _ATTRIBUTE)


def _inner(model: Any) -> Any:
    """The model without its head, whose methods are replaced."""
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < OLDEST:
        raise ValueError(
            f"transformers = {transformers.__version__} is not supported; allowed: {OLDEST[0]}.{OLDEST[1]} or later"
        )
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    allowed = " and ".join(known.__name__ for known in MODELS)
    compiled = hasattr(base, "_orig_mod") or getattr(base, "_compiled_call_impl", None) is not None
    if compiled:
        raise ValueError(
            "model: a compiled model is not allowed, since the number of tokens changes from layer to layer; "
            f"allowed: {allowed} before torch.compile"
        )
    if not isinstance(base, MODELS):
        raise ValueError(f"model = {type(base).__name__} is not known; allowed: {allowed}")
    if (getattr(base, "tp_size", None) or 1) > 1:
        raise ValueError(
            f"tp_size = {base.tp_size} is not allowed; allowed: a model that is not split by tp_plan"
        )
    return base.model


def _check_decoder(config: Any, method: str) -> None:
    """Refuse decoders that the server refuses."""
    why_not = why_not_reducible(config.get_text_config())
    if why_not is not None:
        raise ValueError(f"method = {method!r} reduces in the decoder: {why_not}, or a method of the tower")
    if config.vision_feature_select_strategy == "full":
        raise ValueError(
            f"method = {method!r} reduces in the decoder, to which vision_feature_select_strategy = 'full' hands "
            "[CLS]; allowed: 'default', or a method of the tower"
        )


def _check_device(module: Any, name: str) -> None:
    """Refuse layers on several devices, between which tokens would have to move."""
    devices = sorted({str(_device(part, weight)) for part, weight in _weights(module)})
    if len(devices) > 1:
        raise ValueError(f"{name} is spread over {', '.join(devices)}; allowed: one device")


def _weights(module: Any) -> Iterator[tuple[Any, Tensor]]:
    """Each weight with the module that owns it."""
    for part in module.modules():
        yield from ((part, weight) for weight in part.parameters(recurse=False))


def _device(part: Any, weight: Tensor) -> torch.device:
    """Device on which a weight is used: accelerate's hook brings an offloaded one there before each call."""
    hook = getattr(part, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if weight.is_meta and device is not None:
            return torch.device(device)
    return weight.device
