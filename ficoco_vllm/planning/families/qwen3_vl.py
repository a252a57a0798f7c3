"""Token counts of Qwen3-VL: units of 2 x 2 patches, dynamic resolution, no [CLS]."""

from collections.abc import Mapping
from typing import Any

from ficoco_vllm.planning.resolution import Resolution
from ficoco_vllm.planning.tower_shape import IMAGES, TowerShape

# Limits of the published checkpoints.
_PUBLISHED = {"min_pixels": 256 * 256, "max_pixels": 4096 * 4096}


def shape(hf_config: Any) -> TowerShape:
    """Read a Qwen3-VL configuration, of a dense model or of a mixture of experts.

    Args:
        hf_config: transformers' Qwen3VLConfig or Qwen3VLMoeConfig.
    """
    vision = hf_config.vision_config
    limits = getattr(hf_config, IMAGES, _PUBLISHED)
    unit_size = vision.patch_size * vision.spatial_merge_size
    resolution = Resolution(unit_size, limits["min_pixels"], limits["max_pixels"])
    height, width = resolution.largest
    return TowerShape(
        grid=(height // unit_size, width // unit_size),
        num_layers=vision.depth,
        num_executed_layers=vision.depth,
        with_cls=False,
        tiling=resolution,
        unit=vision.spatial_merge_size**2,
        num_deepstack=len(vision.deepstack_visual_indexes),
    )


def image_settings(processor: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The fewest and the most pixels of an image, and whether images are scaled.

    Args:
        processor: transformers' image processor of the model.
        overrides: `mm_processor_kwargs`, in which the same limit may have several names.
    """
    scoped = {**overrides, **_mapping(overrides.get("images_kwargs"))}
    size = {**dict(processor.size), **_mapping(scoped.get("size"))}
    limits = {
        name: size[edge] if scoped.get(name) is None else scoped[name]
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    }
    return {**limits, "do_resize": scoped.get("do_resize", processor.do_resize)}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
