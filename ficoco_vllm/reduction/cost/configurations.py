"""Reading the sizes of a model from the content of its config.json, family by family."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ficoco_vllm.reduction.cost.shapes import DecoderShape, ModelShape, ProjectorShape, TowerShape

# Transformers' defaults for fields that config.json leaves out, which are most of them in LLaVA checkpoints.
CLIP_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
}
INTERNVIT_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "image_size": 448,
    "patch_size": 14,
}
QWEN3_VL_TOWER_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 1152,
    "depth": 27,
    "num_heads": 16,
    "intermediate_size": 4304,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": (8, 16, 24),
}
LLAMA_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
_QWEN_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 22016,
    "vocab_size": 151936,
}
DECODER_DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "llama": LLAMA_DEFAULTS,
    "mistral": {},
    "qwen2": _QWEN_DEFAULTS,
    "qwen3": {**_QWEN_DEFAULTS, "head_dim": 128},
    "qwen3_vl_text": {**_QWEN_DEFAULTS, "head_dim": 128},
    "qwen3_moe": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "vocab_size": 151936,
    },
    "qwen3_vl_moe_text": {
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "vocab_size": 151936,
    },
}
_LLAVA = {"clip_vision_model": CLIP_DEFAULTS}
_QWEN3_VL = {"qwen3_vl_vision": QWEN3_VL_TOWER_DEFAULTS, "qwen3_vl": QWEN3_VL_TOWER_DEFAULTS}
# By `model_type`: types of the tower with their defaults, and types of the decoder. The first of each is the default.
TOWERS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA,
    "internvl": {"internvl_vision": INTERNVIT_DEFAULTS},
    # Published files name the tower as the model.
    "qwen3_vl": _QWEN3_VL,
    "qwen3_vl_moe": {name.replace("qwen3_vl", "qwen3_vl_moe"): values for name, values in _QWEN3_VL.items()},
}
DECODERS: Mapping[str, tuple[str, ...]] = {
    "llava": ("llama", "mistral"),
    "llava_next": ("llama", "mistral"),
    "internvl": ("qwen2", "qwen3", "qwen3_moe", "llama"),
    "qwen3_vl": ("qwen3_vl_text",),
    "qwen3_vl_moe": ("qwen3_vl_moe_text",),
}
# Side in pixels of the largest square image that Qwen3-VL's processor leaves as it is: `size.longest_edge` of
# preprocessor_config.json is 16777216 pixels in all checkpoints.
QWEN3_VL_LARGEST = 4096
# Larger values are mistakes, and counting them layer by layer would take forever.
MAX_LAYERS, MAX_SIZE = 4096, 2**24


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Read the sizes of a model from the content of its config.json.

    Args:
        config: the parsed config.json; `vision_config` and `text_config` may leave out what transformers
            defaults.

    Returns:
        The sizes, all checked.

    Raises:
        ValueError: a field is missing, is not a positive integer, or describes a model that this planner
            cannot count.

    Source: arXiv:2310.03744 (LLaVA-1.5), arXiv:2504.10479 (InternVL3), arXiv:2511.21631 (Qwen3-VL).
    """
    config = _in_hf_format(config)
    tower, decoder = _readers(config)
    return _MODELS[config["model_type"]](config, tower, _decoder(config, decoder))


def sections(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`vision_config` and `text_config` with transformers' defaults.

    Args:
        config: the parsed config.json.

    Raises:
        ValueError: one is missing, or is of a type that this planner cannot count.
    """
    tower, decoder = _readers(_in_hf_format(config))
    return tower.values, decoder.values


def _in_hf_format(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json of InternVL in OpenGVLab's own format by the names of Hugging Face's; any other as it is."""
    if config.get("model_type") != "internvl_chat":
        return config
    vision = config.get("vision_config")
    if isinstance(vision, Mapping):
        vision = {
            **vision,
            "model_type": "internvl_vision",
            "attention_bias": vision.get("qkv_bias", False),
            "use_qk_norm": vision.get("qk_normalization", True),
            "norm_type": vision.get("norm_type", "rms_norm"),
            "use_mean_pooling": True,  # no norm after the last layer
        }
    return {
        **config,
        "model_type": "internvl",
        "vision_feature_layer": config.get("select_layer", -1),
        "vision_config": vision,
        "text_config": config.get("llm_config"),
    }


def _readers(config: Mapping[str, Any]) -> "tuple[_Reader, _Reader]":
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in _MODELS:
        raise ValueError(f"model_type: got {model_type!r}, allowed: {', '.join((*_MODELS, 'internvl_chat'))}")
    decoders = {name: DECODER_DEFAULTS[name] for name in DECODERS[model_type]}
    return _Reader(config, "vision_config", TOWERS[model_type]), _Reader(config, "text_config", decoders)


def _llava(config: Mapping[str, Any], read: "_Reader", decoder: DecoderShape) -> ModelShape:
    select = config.get("vision_feature_select_strategy", "default")
    if select != "default":
        raise ValueError(
            f"vision_feature_select_strategy: got {select!r}, allowed: 'default' (without [CLS])"
        )
    tower = _vit(read, config.get("vision_feature_layer", -2))
    width = tower.hidden
    tower = replace(
        tower,
        layer_small=4 * width + tower.mlp + width + 4 * width,
        # [CLS], positions and the norm before the first layer; the embedding has no bias.
        small=width + (tower.num_patches + 1) * width + 2 * width,
    )
    return ModelShape(tower, decoder, ProjectorShape(inner=decoder.hidden, small=2 * decoder.hidden))


def _vit(read: "_Reader", feature_layer: Any) -> TowerShape:
    """Sizes of a vision transformer with [CLS], by the names that CLIP and InternViT share."""
    num_layers = read.positive("num_hidden_layers", MAX_LAYERS)
    width, num_heads = read.divisible("hidden_size", "num_attention_heads")
    image_size, patch_size = _sides(read)
    return TowerShape(
        image_size=image_size,
        patch_size=patch_size,
        hidden=width,
        num_heads=num_heads,
        mlp=read.positive("intermediate_size"),
        num_layers=num_layers,
        num_executed=_executed(feature_layer, num_layers),
    )


def _internvl(config: Mapping[str, Any], read: "_Reader", decoder: DecoderShape) -> ModelShape:
    tower = _vit(read, config.get("vision_feature_layer", -1))
    width = tower.hidden
    ratio = config.get("downsample_ratio", 0.5)
    if ratio not in (0.5, 1.0):
        raise ValueError(f"downsample_ratio: got {ratio!r}, allowed: 0.5, 1.0")
    side = round(1 / ratio)
    if tower.image_size // tower.patch_size % side:
        raise ValueError(
            f"vision_config.image_size: got {tower.image_size}, allowed: a multiple of {side * tower.patch_size} "
            "(a unit)"
        )
    norm = width if read.values.get("norm_type") == "rms_norm" else 2 * width
    biases = 3 * width if read.values.get("attention_bias") else 0
    query_key_norms = 2 * width if read.values.get("use_qk_norm") else 0
    last_norm = 0 if read.values.get("use_mean_pooling", True) else 2 * width
    tower = replace(
        tower,
        unit=side**2,
        # Beside norms and biases, two scales of the residual stream.
        layer_small=biases + query_key_norms + width + tower.mlp + width + 2 * norm + 2 * width,
        small=width + (tower.num_patches + 1) * width + width + last_norm,
    )
    small = 2 * side**2 * width + 2 * decoder.hidden
    return ModelShape(tower, decoder, ProjectorShape(inner=decoder.hidden, small=small))


def _qwen3_vl(config: Mapping[str, Any], read: "_Reader", decoder: DecoderShape) -> ModelShape:
    num_layers = read.positive("depth", MAX_LAYERS)
    width, num_heads = read.divisible("hidden_size", "num_heads")
    patch_size, side = read.positive("patch_size", QWEN3_VL_LARGEST), read.positive("spatial_merge_size", 16)
    mlp, frames = read.positive("intermediate_size"), read.positive("temporal_patch_size", 16)
    layers = read.values["deepstack_visual_indexes"]
    if not isinstance(layers, list | tuple) or not all(layer in range(num_layers) for layer in layers):
        allowed = f"layers from 0 to {num_layers - 1}"
        raise ValueError(f"vision_config.deepstack_visual_indexes: got {layers!r}, allowed: {allowed}")
    step = patch_size * side
    tower = TowerShape(
        image_size=QWEN3_VL_LARGEST // step * step,
        patch_size=patch_size,
        hidden=width,
        num_heads=num_heads,
        mlp=mlp,
        num_layers=num_layers,
        num_executed=num_layers,
        unit=side**2,
        num_extra=0,
        frames=frames,
        dynamic=True,
        layer_small=4 * width + mlp + width + 4 * width,
        small=read.positive("num_position_embeddings") * width + width,
    )
    if read.positive("out_hidden_size") != decoder.hidden:
        raise ValueError(
            f"vision_config.out_hidden_size: got {read.positive('out_hidden_size')}, allowed: {decoder.hidden}, as "
            "text_config.hidden_size"
        )
    inner = side**2 * width
    # The last run norms patches, those after other layers whole units.
    small = 2 * width + len(layers) * 2 * inner + (1 + len(layers)) * (inner + decoder.hidden)
    return ModelShape(tower, decoder, ProjectorShape(inner, tuple(layers), small))


_MODELS = {
    "llava": _llava,
    "llava_next": _llava,
    "internvl": _internvl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl,
}


def _sides(read: "_Reader") -> tuple[int, int]:
    """Height and width of an image and of a patch, which are squares."""
    for name in ("image_size", "patch_size"):
        value = read.values.get(name)
        if isinstance(value, list | tuple) and len({*value}) == 1:
            read.values[name] = value[0]
    image_size, patch_size = read.positive("image_size"), read.positive("patch_size")
    if patch_size > image_size:
        raise ValueError(f"{read.name}.patch_size: got {patch_size}, allowed: 1 to image_size = {image_size}")
    return image_size, patch_size


def _executed(feature_layer: Any, num_layers: int) -> int:
    # hidden_states starts with the embeddings, so index k is the output of the k-th layer, counted from 1.
    whole = isinstance(feature_layer, int) and not isinstance(feature_layer, bool)
    if not whole or not -num_layers <= feature_layer <= num_layers or feature_layer == 0:
        allowed = f"one of -{num_layers}..-1, 1..{num_layers}"
        raise ValueError(f"vision_feature_layer: got {feature_layer!r}, allowed: {allowed}")
    return int(feature_layer) if feature_layer > 0 else num_layers + 1 + int(feature_layer)


def _decoder(config: Mapping[str, Any], read: "_Reader") -> DecoderShape:
    num_heads = read.positive("num_attention_heads")
    if "head_dim" not in read.values:
        hidden, _ = read.divisible("hidden_size", "num_attention_heads")
        head_dim = hidden // num_heads
    else:
        hidden, head_dim = read.positive("hidden_size"), read.positive("head_dim")
    num_kv_heads = num_heads
    if "num_key_value_heads" in read.values:
        _, num_kv_heads = read.divisible("num_attention_heads", "num_key_value_heads")
    small = 2 * hidden
    if read.model_type == "qwen2":
        small += (num_heads + 2 * num_kv_heads) * head_dim  # biases of queries, keys and values
    elif read.model_type.startswith("qwen3"):
        small += 2 * head_dim  # norms of queries and keys
    tied = read.values.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    is_mixture = "moe" in read.model_type
    mlp = _experts(read) if is_mixture else {"mlp": read.positive("intermediate_size")}
    return DecoderShape(
        hidden=hidden,
        num_layers=read.positive("num_hidden_layers", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab=read.positive("vocab_size"),
        tied_head=bool(tied),
        layer_small=small,
        **mlp,
    )


def _experts(read: "_Reader") -> dict[str, int]:
    """Fields of a decoder whose layers are all mixtures of experts."""
    for field, allowed in (("mlp_only_layers", []), ("decoder_sparse_step", 1)):
        value = read.values.get(field, allowed)
        if value != allowed:
            raise ValueError(
                f"{read.name}.{field}: got {value!r}, allowed: {allowed!r} (experts in all layers)"
            )
    if "num_local_experts" in read.values:  # transformers' name
        read.values["num_experts"] = read.values["num_local_experts"]
    num_experts = read.positive("num_experts")
    per_token = read.positive("num_experts_per_tok", num_experts)
    return {
        "mlp": per_token * read.positive("moe_intermediate_size"),
        "num_experts": num_experts,
        "experts_per_token": per_token,
    }


class _Reader:
    """Reads sizes out of a section of the configuration; its first model type is the default.

    Args:
        config: the whole configuration.
        name: name of the section.
        types: model types that are allowed, each with the defaults of its fields.
    """

    def __init__(self, config: Mapping[str, Any], name: str, types: Mapping[str, Mapping[str, Any]]) -> None:
        section = config.get(name)
        if not isinstance(section, Mapping):
            raise ValueError(f"{name}: got {section!r}, allowed: an object with the sizes of that part")
        model_type = section.get("model_type", next(iter(types)))
        if model_type not in tuple(types):
            raise ValueError(f"{name}.model_type: got {model_type!r}, allowed: {', '.join(types)}")
        self.name = name
        self.model_type: str = model_type
        given = {field: value for field, value in section.items() if value is not None}
        self.values: dict[str, Any] = {**types[model_type], **given, "model_type": model_type}

    def positive(self, field: str, most: int = MAX_SIZE) -> int:
        value = self.values.get(field)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(f"{self.name}.{field}: got {value!r}, allowed: an integer from 1 to {most}")
        return value

    def divisible(self, field: str, by: str) -> tuple[int, int]:
        value, divisor = self.positive(field), self.positive(by)
        if value % divisor:
            raise ValueError(f"{self.name}.{field}: got {value}, allowed: a multiple of {by} = {divisor}")
        return value, divisor
