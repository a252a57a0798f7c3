"""The model families that can be reduced, one row each.

A family is two files: its module in this folder, which counts an image's tokens without vLLM, and its module in
`models/`, which runs them. docs/adding-a-model.md shows how to add one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ficoco_vllm.planning.families import internvl, llava, qwen3_vl
from ficoco_vllm.planning.tower_shape import IMAGES, TowerShape


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        architecture: vLLM's name of the model class.
        model_class: the class that replaces it, as "module:class"; vLLM imports it when it serves the model.
        shape: reads the sizes of the tower from transformers' configuration. It raises a ValueError that names the
            field, its value and what is allowed where the tower cannot be reduced.
        image_settings: where the number of tokens depends on settings of the image processor (tiles, pixels): reads
            them, by name, from the processor and the server's `mm_processor_kwargs`. At start-up they are stored on the
            model's configuration, where `shape` finds them with `image_settings`. A request may not change them.
        images_in_config: whether `image_settings` reads the model's configuration instead of the processor.
        tower_graphs: whether the class captures its reducing tower as CUDA graphs (`vision/graphs.py`).
    """

    architecture: str
    model_class: str
    shape: Callable[[Any], TowerShape]
    image_settings: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    images_in_config: bool = False
    tower_graphs: bool = False


# By `model_type` of the configuration.
FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        "ficoco_vllm.models.llava:FicocoLlava",
        llava.shape,
        tower_graphs=True,
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration", "ficoco_vllm.models.llava_next:FicocoLlavaNext", llava.next_shape
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        "ficoco_vllm.models.internvl:FicocoInternVL",
        internvl.shape,
        internvl.settings,
    ),
    "internvl_chat": Family(
        "InternVLChatModel",
        "ficoco_vllm.models.internvl_chat:FicocoInternVLChat",
        internvl.chat_shape,
        internvl.chat_settings,
        images_in_config=True,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "ficoco_vllm.models.qwen3_vl:FicocoQwen3VL",
        qwen3_vl.shape,
        qwen3_vl.image_settings,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        "ficoco_vllm.models.qwen3_vl:FicocoQwen3VLMoe",
        qwen3_vl.shape,
        qwen3_vl.image_settings,
    ),
}

# Architectures with reduction, and the classes that replace vLLM's.
ARCHITECTURES = {family.architecture: family.model_class for family in FAMILIES.values()}


def family(hf_config: Any) -> Family:
    """The family of a model.

    Args:
        hf_config: transformers' configuration of the model.

    Raises:
        ValueError: it is not known.
    """
    known = FAMILIES.get(hf_config.model_type)
    if known is None:
        raise ValueError(
            f"ficoco: model_type = {hf_config.model_type!r} is not a known family; allowed: {', '.join(FAMILIES)}"
        )
    return known


def tower_shape(hf_config: Any) -> TowerShape:
    """Sizes of a model's tower.

    Args:
        hf_config: transformers' configuration of the model.

    Raises:
        ValueError: the family is not known, or its tower cannot be reduced.
    """
    return family(hf_config).shape(hf_config)


def read_image_settings(
    hf_config: Any, overrides: Mapping[str, Any], processor: Callable[[], Any]
) -> dict[str, Any] | None:
    """The settings that decide how many tokens an image of a model has; None where there are none.

    Args:
        hf_config: transformers' configuration of the model.
        overrides: `mm_processor_kwargs`.
        processor: returns the model's image processor; called where the settings are its own.

    Raises:
        ValueError: the family is not known.
    """
    known = family(hf_config)
    if known.image_settings is None:
        return None
    return known.image_settings(hf_config if known.images_in_config else processor(), overrides)


def leave_image_settings(hf_config: Any, overrides: Mapping[str, Any], processor: Callable[[], Any]) -> None:
    """Put the settings of a server's images on the model's configuration, where every process finds them.

    Args:
        hf_config: see `read_image_settings`.
        overrides: the server's `mm_processor_kwargs`.
        processor: see `read_image_settings`.

    Raises:
        ValueError: the family is not known.
    """
    settings = read_image_settings(hf_config, overrides, processor)
    if settings is not None:
        setattr(hf_config, IMAGES, settings)
