"""KV cache specifications for vLLM's attention layers: one length per decoder segment."""

from functools import partial
from typing import Any

from vllm.v1.kv_cache_interface import replace_as

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.hooks.wrapping import wrap
from ficoco_vllm.kv.spec import SegmentSpec
from ficoco_vllm.planning.segments import Segments


def hook_kv_cache_specs(decoder: Any, segments: Segments) -> None:
    """Give the layers of each segment a KV cache of their own length.

    vLLM builds the layers from the model's configuration alone and reads each one's specification.

    Args:
        decoder: vLLM's language model, whole on this worker.
        segments: segments of its layers.
    """
    for index, layer in enumerate(decoder.layers):
        wrap(layer.self_attn.attn, "get_kv_cache_spec", partial(_spec, segments.of_layer(index)))


def _spec(segment: int, original: Any, vllm_config: Any) -> SegmentSpec:
    whole = FicocoConfig.of(vllm_config.model_config.hf_config).windows == "off"
    spec: SegmentSpec = replace_as(original(vllm_config), SegmentSpec, non_causal=whole, segment=segment)
    return spec
