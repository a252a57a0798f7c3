"""Sizes of a LLaVA that determine its cost, read from its Hugging Face configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Transformers' defaults for fields that config.json leaves out, which are most of them in LLaVA checkpoints.
CLIP_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 32,
}
LLAMA_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
}
MODEL_TYPES = ("llava", "llava_next")
# Larger values are mistakes, and counting them layer by layer would take forever.
MAX_LAYERS, MAX_SIZE = 4096, 2**24


@dataclass(frozen=True)
class TowerShape:
    """The executed part of a CLIP vision tower.

    `num_executed` counts the layers up to the one whose output LLaVA reads: 23 of 24 for feature layer -2.
    """

    image_size: int
    patch_size: int
    hidden: int
    num_heads: int
    mlp: int
    num_layers: int
    num_executed: int

    @property
    def num_patches(self) -> int:
        """Visual tokens of one image before any reduction, [CLS] not counted."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class DecoderShape:
    """A Llama decoder: gated MLP of three matrices, no biases."""

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied_head: bool

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class ModelShape:
    """Vision tower, two-layer projector and decoder of one LLaVA."""

    tower: TowerShape
    decoder: DecoderShape


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """Reads the sizes of a LLaVA from the content of its config.json.

    Args:
        config: the parsed config.json; `vision_config` and `text_config` may leave out what transformers
            defaults.

    Returns:
        The sizes, all checked.

    Raises:
        ValueError: a field is missing, is not a positive integer, or describes a model that this planner
            cannot count.

    Source: arXiv:2310.03744 (LLaVA-1.5).
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type: got {model_type!r}, allowed: {', '.join(MODEL_TYPES)}")
    select = config.get("vision_feature_select_strategy", "default")
    if select != "default":
        raise ValueError(
            f"vision_feature_select_strategy: got {select!r}, allowed: 'default' (without [CLS])"
        )
    return ModelShape(_tower(config), _decoder(config))


def _tower(config: Mapping[str, Any]) -> TowerShape:
    section = _section(config, "vision_config")
    read = _Reader("vision_config", section, CLIP_DEFAULTS, ("clip_vision_model",))
    num_layers = read.positive("num_hidden_layers", MAX_LAYERS)
    hidden, num_heads = read.divisible("hidden_size", "num_attention_heads")
    image_size, patch_size = read.positive("image_size"), read.positive("patch_size")
    if patch_size > image_size:
        raise ValueError(
            f"vision_config.patch_size: got {patch_size}, allowed: 1 to image_size = {image_size}"
        )
    return TowerShape(
        image_size=image_size,
        patch_size=patch_size,
        hidden=hidden,
        num_heads=num_heads,
        mlp=read.positive("intermediate_size"),
        num_layers=num_layers,
        num_executed=_executed(config.get("vision_feature_layer", -2), num_layers),
    )


def _executed(feature_layer: Any, num_layers: int) -> int:
    # hidden_states starts with the embeddings, so index k is the output of the k-th layer, counted from 1.
    whole = isinstance(feature_layer, int) and not isinstance(feature_layer, bool)
    if not whole or not -num_layers <= feature_layer <= num_layers or feature_layer == 0:
        allowed = f"one of -{num_layers}..-1, 1..{num_layers}"
        raise ValueError(f"vision_feature_layer: got {feature_layer!r}, allowed: {allowed}")
    return int(feature_layer) if feature_layer > 0 else num_layers + 1 + int(feature_layer)


def _decoder(config: Mapping[str, Any]) -> DecoderShape:
    section = _section(config, "text_config")
    read = _Reader("text_config", section, LLAMA_DEFAULTS, ("llama", "mistral"))
    num_heads = read.positive("num_attention_heads")
    if section.get("head_dim") is None:
        hidden, _ = read.divisible("hidden_size", "num_attention_heads")
        head_dim = hidden // num_heads
    else:
        hidden, head_dim = read.positive("hidden_size"), read.positive("head_dim")
    num_kv_heads = num_heads
    if section.get("num_key_value_heads") is not None:
        _, num_kv_heads = read.divisible("num_attention_heads", "num_key_value_heads")
    return DecoderShape(
        hidden=hidden,
        num_layers=read.positive("num_hidden_layers", MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp=read.positive("intermediate_size"),
        vocab=read.positive("vocab_size"),
        tied_head=bool(section.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"{name}: got {section!r}, allowed: an object with the sizes of that part")
    return section


class _Reader:
    """Reads sizes out of one section; the first of `types` is the one that `defaults` belong to."""

    def __init__(
        self, name: str, section: Mapping[str, Any], defaults: Mapping[str, int], types: tuple[str, ...]
    ) -> None:
        model_type = section.get("model_type", types[0])
        if model_type not in types:
            raise ValueError(f"{name}.model_type: got {model_type!r}, allowed: {', '.join(types)}")
        self.name = name
        self.values = {**(defaults if model_type == types[0] else {}), **_given(section)}

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


def _given(section: Mapping[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in section.items() if value is not None}
