"""Tiles, run through the tower in batches of equal budget and crop."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ficoco_vllm.planning.tiles import Layout, Tile
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import Budget, VisionPlan, VisionPlanner
from ficoco_vllm.vision.packing import Kept
from ficoco_vllm.vision.tower import Tokens, cropped

# Tiles of equal budget and crop, which run together: index of the image, index of the tile in its layout, tile.
_Jobs = list[tuple[int, int, Tile]]


def keep_tiles(
    pixels: Any,
    layouts: Sequence[Layout],
    budgets: Sequence[Budget],
    planner: VisionPlanner,
    *,
    most: int,
    whole: Callable[[Tensor, tuple[int, int]], Tensor],
    encode: Callable[[Tensor, VisionPlan, tuple[int, int], Crop | None, Sequence[tuple[int, int]]], Tokens],
    project: Callable[[Tensor], Tensor],
) -> dict[int, list[Kept]]:
    """Run all tiles of the images that are reduced.

    Args:
        pixels: (n, tiles, ...), or as many tensors, of different numbers of tiles.
        layouts: layouts of the images.
        budgets: budgets of the images.
        planner: planner of the model.
        most: tiles of the largest grid that run in one batch.
        whole: units of tiles that are not reduced: pixels of B tiles and their grid to (B, U, unit * D).
        encode: runs the tower by a plan, over pixels of B tiles of one grid; a crop is given where tiles have padding,
            then the image and the number of each tile.
        project: units (B, K, unit * D) to tokens of the language model (B, K, hidden size).

    Returns:
        Image to the kept tokens of each tile of its layout; their positions count the units of the tile's crop.
    """
    tiling, unit = planner.shape.tiling, planner.shape.unit
    assert tiling is not None
    groups: dict[tuple[str | None, int, Crop], _Jobs] = defaultdict(list)
    for image, (layout, budget) in enumerate(zip(layouts, budgets, strict=True)):
        for number, tile in enumerate(layout.tiles if layout.reduces else ()):
            groups[budget.method, tile.keep, tile.place.crop].append((image, number, tile))
    kept: dict[tuple[int, int], Kept] = {}
    for (method, count, crop), jobs in groups.items():
        plan = planner.tile_plan(Budget(method, count), jobs[0][2])
        shown = (crop.rows, crop.columns)
        grid = planner.shape.grid if tiling.pads else shown
        at_once = max(most, most * planner.shape.num_units // (grid[0] * grid[1]))
        for start in range(0, len(jobs), at_once):
            chunk = jobs[start : start + at_once]
            batch = torch.stack([pixels[image][tile.place.number] for image, _, tile in chunk])
            if plan is None:
                features = whole(batch, grid)
                if tiling.pads:
                    features = cropped(features, grid, crop)
                position = torch.arange(crop.num_units, device=features.device).expand(len(batch), -1)
            else:
                tiles = [(image, tile.place.number) for image, _, tile in chunk]
                tokens = encode(batch, plan, grid, crop if shown != grid else None, tiles)
                features, position = tokens.split(unit)[1], tokens.position
            for (image, number, _), *one in zip(chunk, project(features), position, strict=True):
                kept[image, number] = Kept(*one)
    return {
        image: [kept[image, number] for number in range(len(layout.tiles))]
        for image, layout in enumerate(layouts)
        if layout.reduces
    }
