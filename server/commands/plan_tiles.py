"""`ficoco-vllm plan` for images that are cut into tiles (LLaVA-NeXT)."""

import argparse
from collections.abc import Mapping
from typing import Any

from ficoco_vllm.reduction.cost import (
    Budget,
    Estimate,
    ModelShape,
    TiledPlan,
    TilePlan,
    estimate_tiles,
    plan_tiles,
)


def is_tiled(config: Mapping[str, Any]) -> bool:
    """Whether a model cuts its images into tiles."""
    return config.get("model_type") == "llava_next"


def tiled_costs(
    args: argparse.Namespace,
    config: Mapping[str, Any],
    shape: ModelShape,
    budgets: tuple[Budget, Budget | None],
) -> tuple[Estimate, Estimate, dict[str, Any]]:
    """What images of one size cost.

    Args:
        args: of the command line.
        config: the content of config.json.
        shape: the model.
        budgets: of each tile for a method of the tower, of each image for one of the decoder; and of the tower's part
            of a method that reduces twice.

    Returns:
        The cost with reduction, without, and what the report tells of tokens.

    Raises:
        ValueError: an option or a field of the configuration is wrong.
    """
    # These load torch and transformers, which plans of other models do without.
    from ficoco_vllm.planning.tiling import Tiling

    pinpoints = _pinpoints(config)
    tower = shape.tower
    tiling = Tiling(pinpoints, tower.image_size, tower.image_size // tower.patch_size)
    height, width = _size(args.image_size) or max(pinpoints, key=lambda size: tiling.num_tokens(*size))
    places = [place for place in tiling.places(height, width) if place.crop.num_patches]
    sizes = [place.crop.num_patches for place in places]
    before = tiling.num_tokens(height, width)
    newlines = (before - sum(sizes), len({place.row for place in places} - {-1}))
    image = plan_tiles(shape, args.method, budgets[0], budgets[1], sizes, newlines)
    N, num_layers = tower.num_patches, tower.num_executed
    all_tiles = tiling.places(height, width)
    stock = TiledPlan(
        tuple(
            TilePlan.of(N, (place.crop.num_patches,) * (num_layers + 1), place.crop.num_patches)
            for place in all_tiles
        ),
        N * len(all_tiles),
        (before,) * (shape.decoder.num_layers + 1),
    )
    prompt = {"num_text_tokens": args.text_tokens, "dtype": args.dtype}
    base = image.tiles[0]
    return (
        estimate_tiles(shape, _times(image, args.images), **prompt),
        estimate_tiles(shape, _times(stock, args.images), **prompt),
        {
            "encoder_tokens": [entering for entering, _ in base.layers] + [base.layers[-1][1]],
            "decoder_visual_tokens": list(image.decoder),
            "mean_visual_tokens": sum(image.decoder[:-1]) / shape.decoder.num_layers,
            "image_size": [width, height],
            "image_tokens": before,
            "tiles": [{"patches": tile.entering, "kept": tile.kept} for tile in image.tiles],
        },
    )


def _times(plan: TiledPlan, num_images: int) -> TiledPlan:
    if num_images < 1:
        raise ValueError(f"num_images: got {num_images}, allowed: at least 1")
    decoder = tuple(count * num_images for count in plan.decoder)
    return TiledPlan(plan.tiles * num_images, plan.projected * num_images, decoder)


def _size(text: str | None) -> tuple[int, int] | None:
    """Height and width of an image from WIDTHxHEIGHT."""
    if text is None:
        return None
    width, _, height = text.lower().partition("x")
    if not (
        width.isdecimal() and height.isdecimal() and 1 <= int(width) <= 2**16 and 1 <= int(height) <= 2**16
    ):
        raise ValueError(f"image_size: got {text!r}, allowed: WIDTHxHEIGHT in pixels, each 1 to {2**16}")
    return int(height), int(width)


def _pinpoints(config: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    found = config.get("image_grid_pinpoints")
    side = config["vision_config"].get("image_size")
    try:
        pinpoints = tuple((int(height), int(width)) for height, width in found or ())
    except (TypeError, ValueError):
        pinpoints = ()
    if not pinpoints or any(length < side or length % side for size in pinpoints for length in size):
        raise ValueError(
            f"image_grid_pinpoints: got {found!r}, allowed: pairs of height and width, multiples of image_size = {side}"
        )
    return pinpoints
