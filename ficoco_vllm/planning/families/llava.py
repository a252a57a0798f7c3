"""Token counts of LLaVA-1.5 and LLaVA-NeXT: a CLIP tower, whose patches are the tokens of the language model."""

from dataclasses import replace
from typing import Any

from ficoco_vllm.planning.tiling import AnyRes
from ficoco_vllm.planning.tower_shape import TowerShape


def shape(hf_config: Any) -> TowerShape:
    """Read a LLaVA configuration: one image, one grid.

    Args:
        hf_config: transformers' LlavaConfig.

    Raises:
        ValueError: the tower is not a CLIP, or several feature layers are concatenated.
    """
    vision = hf_config.vision_config
    if vision.model_type != "clip_vision_model":
        raise ValueError(
            f"ficoco: vision_config.model_type = {vision.model_type!r} cannot be reduced; "
            "allowed: 'clip_vision_model' (the methods read the attention of a [CLS] token)"
        )
    layer = hf_config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(
            f"ficoco: vision_feature_layer = {layer!r} cannot be reduced; allowed: one layer (an integer)"
        )
    side = vision.image_size // vision.patch_size
    return TowerShape(
        grid=(side, side),
        num_layers=vision.num_hidden_layers,
        num_executed_layers=layer if layer >= 0 else vision.num_hidden_layers + layer + 1,
        with_cls=hf_config.vision_feature_select_strategy == "full",
    )


def next_shape(hf_config: Any) -> TowerShape:
    """Read a LLaVA-NeXT configuration: images in tiles.

    Args:
        hf_config: transformers' LlavaNextConfig.

    Raises:
        ValueError: see `shape`, or the model cannot cut its images into tiles.
    """
    tile = shape(hf_config)
    if tile.with_cls:
        raise ValueError(
            "ficoco: vision_feature_select_strategy = 'full' has no place for [CLS] among the tiles of "
            "LLaVA-NeXT; allowed: 'default'"
        )
    pinpoints = tuple((height, width) for height, width in hf_config.image_grid_pinpoints)
    return replace(tile, tiling=AnyRes(pinpoints, hf_config.vision_config.image_size, tile.grid[0]))
