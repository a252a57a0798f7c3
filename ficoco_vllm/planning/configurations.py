"""Fields of transformers' configuration that plans read, from config.json: importing transformers takes seconds."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ficoco_vllm.planning.families import FAMILIES, leave_image_settings
from ficoco_vllm.planning.tower_shape import IMAGES
from ficoco_vllm.reduction.cost.configurations import QWEN3_VL_LARGEST, sections

# Transformers' defaults for fields of config.json, by `model_type`.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llava": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    "llava_next": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    "internvl": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
        "downsample_ratio": 0.5,
    },
    # Those of the class that a checkpoint of this format brings.
    "internvl_chat": {
        "select_layer": -1,
        "downsample_ratio": 0.5,
        "ps_version": "v1",
        "dynamic_image_size": False,
        "use_thumbnail": False,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
    },
}
_QWEN3_VL = {"do_resize": True, "size": {"shortest_edge": 256**2, "longest_edge": QWEN3_VL_LARGEST**2}}
# The image processor's settings in all published checkpoints, by `model_type`.
_IMAGES: Mapping[str, Mapping[str, Any]] = {
    "internvl": {"crop_to_patches": True, "min_patches": 1, "max_patches": 12},
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": _QWEN3_VL,
}


def hf_config_of(config: Mapping[str, Any], images: Mapping[str, Any] | None = None) -> Any:
    """A stand-in for transformers' configuration of a model.

    Args:
        config: content of config.json.
        images: content of preprocessor_config.json; fields that it leaves out are those of published checkpoints.

    Raises:
        ValueError: the family is not known, a section is missing, or a setting of the image processor is not allowed.
    """
    vision, text = sections(config)
    model_type = config["model_type"]
    if model_type not in FAMILIES:
        raise ValueError(f"model_type: got {model_type!r}, allowed: {', '.join(FAMILIES)}")
    for field in ("image_size", "patch_size"):
        if model_type == "internvl" and isinstance(vision[field], int):
            vision[field] = [vision[field]] * 2
    text_config = SimpleNamespace(**text)
    given = {
        **_DEFAULTS.get(model_type, {}),
        **config,
        "vision_config": SimpleNamespace(**vision),
        "text_config": text_config,
        "get_text_config": lambda: text_config,
    }
    hf_config = SimpleNamespace(**given)
    known = {**_IMAGES.get(model_type, {}), **(images or {})}
    try:
        leave_image_settings(hf_config, {}, lambda: SimpleNamespace(**known))
        settings = getattr(hf_config, IMAGES, {}).values()
        valid = all(isinstance(value, int) and value >= 0 for value in settings)
    except (AttributeError, KeyError, TypeError, ValueError):
        valid = False
    if not valid and not FAMILIES[model_type].images_in_config:
        kept = {name: known[name] for name in _IMAGES.get(model_type, known)}
        raise ValueError(f"preprocessor_config.json: got {kept}, allowed: the image processor's settings")
    return hf_config
