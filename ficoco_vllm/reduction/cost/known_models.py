"""Configurations of well-known checkpoints, so that they can be planned for without a download.

Source: config.json of each checkpoint on Hugging Face; fields that it leaves out have transformers' defaults. The
towers of InternVL3 are InternViT-300M and, with 38B, InternViT-6B; the decoders are those of Qwen2.5, which it extends
by seven tokens, and of Qwen3.
"""

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
_INTERNVIT_300M: Mapping[str, Any] = {
    "model_type": "internvl_vision",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": [448, 448],
    "patch_size": [14, 14],
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
    "use_mean_pooling": True,
}
_INTERNVIT_6B: Mapping[str, Any] = {
    **_INTERNVIT_300M,
    "hidden_size": 3200,
    "num_hidden_layers": 45,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
}
_QWEN3_VL_TOWER: Mapping[str, Any] = {
    "model_type": "qwen3_vl",
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [8, 16, 24],
}
_QWEN3_VL_SMALL_TOWER: Mapping[str, Any] = {
    **_QWEN3_VL_TOWER,
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
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


def _qwen(hidden: int, mlp: int, num_layers: int, num_heads: int, num_kv_heads: int) -> Mapping[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
    }


_QWEN2_5_1_5B = _qwen(1536, 8960, 28, 12, 2)
_QWEN2_5_7B = _qwen(3584, 18944, 28, 28, 4)
_QWEN2_5_32B = _qwen(5120, 27648, 64, 40, 8)
_QWEN3_1_7B = _qwen(2048, 6144, 28, 16, 8)
_QWEN3_4B = _qwen(2560, 9728, 36, 32, 8)
_QWEN3_8B = _qwen(4096, 12288, 36, 32, 8)
_QWEN3_32B = _qwen(5120, 25600, 64, 64, 8)
_QWEN3_30B_A3B: Mapping[str, int] = {
    **_qwen(2048, 6144, 48, 32, 4),
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
_QWEN3_235B_A22B: Mapping[str, int] = {
    **_QWEN3_30B_A3B,
    **_qwen(4096, 12288, 94, 64, 4),
    "moe_intermediate_size": 1536,
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


def _internvl(decoder: Mapping[str, Any], tower: Mapping[str, Any] = _INTERNVIT_300M) -> Mapping[str, Any]:
    return {
        "model_type": "internvl",
        "downsample_ratio": 0.5,
        "image_seq_length": 256,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "vision_config": tower,
        "text_config": {"model_type": "qwen2", "vocab_size": 151674, **decoder},
    }


def _qwen3_vl(
    decoder: Mapping[str, int], tower: Mapping[str, Any] = _QWEN3_VL_TOWER, *, tied: bool = False
) -> Mapping[str, Any]:
    model_type = "qwen3_vl_moe" if "num_experts" in decoder else "qwen3_vl"
    text_config = {"model_type": f"{model_type}_text", "head_dim": 128, "vocab_size": 151936, **decoder}
    if "num_experts" in decoder:
        text_config["tie_word_embeddings"] = tied  # the default of its class is another one than the model's
    return {
        "model_type": model_type,
        "tie_word_embeddings": tied,
        "vision_config": {**tower, "model_type": model_type, "out_hidden_size": decoder["hidden_size"]},
        "text_config": text_config,
    }


_INTERNVL: Mapping[str, Mapping[str, Any]] = {
    "OpenGVLab/InternVL3-2B": _internvl(_QWEN2_5_1_5B),
    "OpenGVLab/InternVL3-8B": _internvl(_QWEN2_5_7B),
    "OpenGVLab/InternVL3-38B": _internvl(_QWEN2_5_32B, _INTERNVIT_6B),
    "OpenGVLab/InternVL3_5-8B": _internvl(
        {"model_type": "qwen3", "head_dim": 128, "vocab_size": 151936, **_QWEN3_8B}
    ),
    "OpenGVLab/InternVL3_5-30B-A3B": _internvl(
        {"model_type": "qwen3_moe", "head_dim": 128, "vocab_size": 151936, **_QWEN3_30B_A3B}
    ),
}

KNOWN_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llava-hf/llava-1.5-7b-hf": _llava_1_5(**_VICUNA_7B),
    "llava-hf/llava-1.5-13b-hf": _llava_1_5(**_VICUNA_13B),
    "llava-hf/llava-v1.6-vicuna-7b-hf": _llava_next(**_VICUNA_7B),
    "llava-hf/llava-v1.6-vicuna-13b-hf": _llava_next(**_VICUNA_13B),
    **_INTERNVL,
    # The same weights in Hugging Face's format.
    **{f"{name}-{'HF' if '3_5' in name else 'hf'}": config for name, config in _INTERNVL.items()},
    "Qwen/Qwen3-VL-2B-Instruct": _qwen3_vl(_QWEN3_1_7B, _QWEN3_VL_SMALL_TOWER, tied=True),
    "Qwen/Qwen3-VL-4B-Instruct": _qwen3_vl(_QWEN3_4B, _QWEN3_VL_SMALL_TOWER, tied=True),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3_vl(_QWEN3_8B),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3_vl(_QWEN3_32B),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": _qwen3_vl(_QWEN3_30B_A3B),
    "Qwen/Qwen3-VL-235B-A22B-Instruct": _qwen3_vl(_QWEN3_235B_A22B),
}
