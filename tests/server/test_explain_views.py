"""LLaVA-NeXT's tiles in an explanation: their places in the image, and the order of their tokens in the decoder."""

from itertools import count
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.llava_next.modeling_llava_next import unpad_image

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.tiling import AnyRes, best_resolution
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.server.explain.picture import panels
from ficoco_vllm.server.explain.views import TracedImage
from ficoco_vllm.tracing.chain import read_steps

SIDE, PATCH = 4, 8
TILING = AnyRes(((32, 64), (64, 32), (64, 64), (96, 32), (32, 96)), SIDE * PATCH, SIDE)
SHAPE = TowerShape((SIDE, SIDE), num_layers=8, num_executed_layers=7, with_cls=False, tiling=TILING)
SIZES = [(64, 64), (40, 300), (300, 40), (50, 60), (61, 64), (10, 10)]


def image(size: tuple[int, int], keep: int, **settings: Any) -> TracedImage:
    config = FicocoConfig.parse({"method": "tome", "keep": keep, **settings})
    return TracedImage.of(VisionPlanner.shared(config, SHAPE), Budget("tome", keep), size, None)


@pytest.mark.parametrize("size", SIZES)
def test_patches_without_reduction_are_in_stock_order(size: tuple[int, int]) -> None:
    traced = image(size, SIDE * SIDE)
    rows, columns = (length // (SIDE * PATCH) for length in best_resolution(*size, TILING.pinpoints))
    base, *tiles = [list(range(1000 * tile, 1000 * tile + 16)) for tile in range(1 + rows * columns)]
    # As transformers packs them, with names in place of features.
    grid = torch.tensor(tiles).view(rows, columns, SIDE, SIDE).permute(0, 2, 1, 3).reshape(1, rows * SIDE, -1)
    lines = unpad_image(grid, size)[0]
    expected = base + [name for line in lines.tolist() for name in (*line, -1)]
    # Our names count the patches of one tile after the other, without padding.
    names = {name: index for index, name in enumerate(sorted(base + lines.flatten().tolist()))}
    parts, start = [], 0
    for number in traced.num_patches:
        parts.append(list(range(start, start + number)))
        start += number
    fresh = count(start)
    assert traced.pack(parts, fresh) == [
        index if index >= 0 else start + sum(1 for name in expected[:place] if name < 0)
        for place, index in enumerate(names.get(name, -1) for name in expected)
    ]
    assert traced.num_entering == len(expected) == start + traced.num_extra


@pytest.mark.parametrize("size", SIZES)
def test_views_cover_the_image(size: tuple[int, int]) -> None:
    traced = image(size, 4)
    base, *tiles = traced.views
    assert (base.first, base.grid, base.box, base.tile) == (0, (SIDE, SIDE), (0.0, 0.0, 1.0, 1.0), None)
    assert tiles[-1].first + tiles[-1].grid[0] * tiles[-1].grid[1] == sum(traced.num_patches)
    for axis in (0, 1):
        patch = tiles[0].box[axis + 2] / tiles[0].grid[1 - axis]
        assert min(view.box[axis] for view in tiles) == pytest.approx(0, abs=patch)
        assert max(view.box[axis] + view.box[axis + 2] for view in tiles) == pytest.approx(1, abs=patch)
    picture = Image.new("RGB", (size[1], size[0]))
    explanation: Any = type("Explained", (), {"views": list(traced.views)})
    whole, grid = panels(picture, explanation)
    for panel in (whole.resized(400), grid.resized(400)):
        boxes = [box for token in range(sum(traced.num_patches)) for box in panel.boxes(token)]
        num_patches = sum(view.grid[0] * view.grid[1] for view in panel.views)
        assert len(boxes) == num_patches
        patch = max(right - left for left, _, right, _ in boxes) + 1
        assert min(box[0] for box in boxes) == pytest.approx(0, abs=patch)
        assert max(box[2] for box in boxes) == pytest.approx(399, abs=patch)


def test_each_tile_has_its_own_reductions() -> None:
    """Two tiles, one of which reduces later and less, and newlines after the rows of tiles."""
    traced = image((64, 64), 10)
    nothing = {"rows": [], "columns": [], "values": [], "site": "encoder"}

    def drops(tile: int, layer: int, num_tokens: int, num_removed: int) -> dict[str, Any]:
        kept = list(range(num_removed, num_tokens))
        size = [1.0] * len(kept)
        return {
            **nothing,
            "tile": tile,
            "layer": layer,
            "source": range(num_removed),
            "target": kept,
            "size": size,
        }

    trace = [drops(tile, layer, 16 - 3 * (layer - 3), 3) for tile in range(5) for layer in (3, 4)]
    trace += [{**drops(0, 5, 52, 22), "site": "decoder"}]
    steps = read_steps(traced.complete(trace), traced.num_patches, traced.pack)
    assert [(step.site, step.layer, len(step.kept)) for step in steps] == [
        ("encoder", 3, 5 * 13),
        ("encoder", 4, 5 * 10),
        ("decoder", 5, 30),
    ]
    assert [left.token for left in steps[0].left] == [
        16 * tile + token for tile in range(5) for token in range(3)
    ]
    # The base view's ten, then the upper tiles' from line to line: the last two of the second line, and so on.
    decoder = [left.token for left in steps[2].left]
    assert decoder[:10] == list(range(6, 16))
    assert decoder[10:] == [22, 23, 38, 39, 24, 25, 26, 27, 40, 41, 42, 43]
    assert [name for name in steps[2].kept if name >= 80] == [80, 81]


def test_a_tile_that_keeps_nothing_is_gone_from_the_start() -> None:
    traced = image((64, 64), 2, keep_per="image")
    assert traced.layout is not None
    assert len(traced.layout.tiles) == 2
    trace = [
        {
            "site": "encoder",
            "layer": 3,
            "tile": tile.place.number,
            "source": range(15),
            "target": [15],
            "rows": [],
            "columns": [],
            "values": [],
            "size": [16.0],
        }
        for tile in traced.layout.tiles
    ]
    (step,) = read_steps(traced.complete(trace), traced.num_patches, traced.pack)
    assert step.kept == (15, 31)
    assert len(step.left) == 78
    assert traced.complete([]) == []
