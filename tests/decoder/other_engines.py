"""Queries in the process of an engine about other configurations, for which nothing is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm import LLM
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.utils.torch_utils import set_default_torch_dtype

from ficoco_vllm.metrics.counting import token_layer_bytes
from tests.decoder.calls import configure
from tests.support.versions import kv_cache_configs


def layers_of(
    engine: LLM, model: str, ficoco: dict[str, Any], options: dict[str, Any], stock: bool
) -> dict[str, str]:
    """Implementation of each layer in another engine; nothing is allocated.

    Args:
        engine: whose process is prepared for models.
        model: folder.
        ficoco: our settings.
        options: of the engine.
        stock: whether vLLM's own class is built instead of ours.

    Returns:
        Name of each layer to the classes of its method and, where the method has several, its scheme.
    """
    _, built = _build(model, ficoco, options, LlavaForConditionalGeneration if stock else None)
    result = {}
    for name, module in built.named_modules():
        method = getattr(module, "quant_method", None)
        if method is not None:
            result[name] = f"{type(method).__name__} {type(getattr(module, 'scheme', None)).__name__}"
    return result


@dataclass
class Cache:
    """KV cache of an engine: bytes of a token in one layer, as metrics count them, and for each group its segment and
    the bytes of a block in one layer.
    """

    token_bytes: int
    num_blocks: int
    segments: list[int | None]
    page_bytes: list[int]


def cache_of(engine: LLM, model: str, ficoco: dict[str, Any], options: dict[str, Any]) -> Cache:
    """KV cache of another engine in 64 MiB."""
    config, _ = _build(model, ficoco, options)
    # As the worker's backend requires; an engine's core would request it.
    config.cache_config.kv_cache_layout = engine.llm_engine.vllm_config.cache_config.kv_cache_layout
    layers = get_layers_from_vllm_config(config, Attention)
    specs = {
        name: layer.get_kv_cache_spec(config)
        for name, layer in layers.items()
        if name.startswith("language_model.")
    }
    (result,) = kv_cache_configs(config, [specs], 2**26)
    groups = [group.kv_cache_spec for group in result.kv_cache_groups]
    return Cache(
        token_layer_bytes(config),
        result.num_blocks,
        [getattr(spec, "segment", None) for spec in groups],
        [spec.page_size_bytes for spec in groups],
    )


def _build(
    model: str, ficoco: dict[str, Any], options: dict[str, Any], model_class: Any = None
) -> tuple[Any, torch.nn.Module]:
    """Configuration and model of another engine, without memory for its weights."""
    config = configure(model, ficoco, options)
    with set_default_torch_dtype(config.model_config.dtype), torch.device("meta"):
        return config, initialize_model(config, model_class=model_class)
