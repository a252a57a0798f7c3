"""Configurations of well-known checkpoints, so that they can be planned for without a download."""

from collections.abc import Mapping
from typing import Any

_CLIP_LARGE_336: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 336,
    "patch_size": 14,
}


_VICUNA_7B: Mapping[str, int] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
}
_VICUNA_13B: Mapping[str, int] = {
    "hidden_size": 5120,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "intermediate_size": 13824,
}


def _llava_1_5(**text_config: int) -> Mapping[str, Any]:
    return {
        "model_type": "llava",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vision_config": _CLIP_LARGE_336,
        "text_config": {"model_type": "llama", "vocab_size": 32064, **text_config},
    }


def _llava_next(**text_config: int) -> Mapping[str, Any]:
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return {**_llava_1_5(**text_config), "model_type": "llava_next", "image_grid_pinpoints": pinpoints}


KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava_1_5(**_VICUNA_7B),
    "llava-hf/llava-1.5-13b-hf": _llava_1_5(**_VICUNA_13B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(**_VICUNA_7B),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _llava_next(**_VICUNA_13B),
}
