"""How many tokens each tile of an image keeps, and so how many an image takes in the prompt: integers, no pixels.

Processor and tower compute the same from an image's size and its budget.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ficoco_vllm.planning.tiling import Place
from ficoco_vllm.planning.tower import Budget, VisionPlan, VisionPlanner
from ficoco_vllm.reduction.cost import TiledPlan, TilePlan


class Tile(NamedTuple):
    """A tile that keeps tokens.

    Attributes:
        place: in the image.
        keep: tokens that it keeps, at least one.
    """

    place: Place
    keep: int


@dataclass(frozen=True)
class Layout:
    """An image under a budget.

    Attributes:
        tiles: base view first; tiles that keep nothing are missing.
        reduces: whether any patch that shows the image leaves. If not, the image goes the way of stock vLLM.
        num_tokens: in the prompt: those that are kept, and a newline behind each row of tiles that keeps any.
        num_before: the same without reduction, as in stock vLLM.
    """

    tiles: tuple[Tile, ...]
    reduces: bool
    num_tokens: int
    num_before: int

    @property
    def newline_rows(self) -> tuple[int, ...]:
        """Rows of tiles that a newline stands behind."""
        return tuple(sorted({tile.place.row for tile in self.tiles} - {-1}))


def layout(planner: VisionPlanner, height: int, width: int, budget: Budget) -> Layout:
    """How an image meets a budget.

    Args:
        planner: of a model that cuts images into tiles.
        height: of the image in pixels.
        width: of the image in pixels.
        budget: of each tile, or of the image where the settings say so. Patches of padding are never kept, so that a
            tile that has fewer others than its budget keeps those.

    Raises:
        ValueError: the method's schedule cannot reach the budget in one of the tiles.
    """
    return _layout(planner, height, width, budget)


def tile_plan(planner: VisionPlanner, budget: Budget, tile: Tile) -> VisionPlan | None:
    """How the tower brings a tile down to what it keeps, None where all of its patches but the padding stay.

    Args:
        planner: of the model.
        budget: of the image; its method.
        tile: of the image.

    Raises:
        ValueError: the method's schedule cannot reach it.
    """
    crop = tile.place.crop
    if tile.keep >= crop.num_patches:
        return None
    return planner.of_grid((crop.rows, crop.columns)).plan(Budget(budget.method, tile.keep))


def served_tiles(
    planner: VisionPlanner, budget: Budget, sizes: Sequence[tuple[int, int]], decoder: tuple[int, ...]
) -> TiledPlan:
    """Images under a budget, as the cost model counts them.

    Args:
        planner: of the model.
        budget: of each tile or image.
        sizes: height and width of each image in pixels.
        decoder: visual tokens of all images in each decoder layer and behind the last.
    """
    N, num_layers = planner.shape.num_patches, planner.shape.num_executed_layers
    tiles, projected = [], 0
    for height, width in sizes:
        found = layout(planner, height, width, budget)
        assert planner.shape.tiling is not None
        whole = [Tile(place, place.crop.num_patches) for place in planner.shape.tiling.places(height, width)]
        for tile in found.tiles if found.reduces else whole:
            size = tile.place.crop.num_patches
            plan = tile_plan(planner, budget, tile)
            counts = [size]
            for layer in range(num_layers):
                removed = plan.removals.get(layer, 0) if plan else 0
                counts.append(counts[-1] - removed + (plan.reducer.num_extra if plan and removed else 0))
            tiles.append(TilePlan.of(N, counts, tile.keep))
            projected += (
                tile.keep if found.reduces else N
            )  # stock vLLM crops the padding behind the projector
    return TiledPlan(tuple(tiles), projected, decoder)


def shared_out(keep: int, sizes: Sequence[int]) -> list[int]:
    """A budget shared out in proportion to sizes, by largest remainders, of equals the first one first.

    Args:
        keep: 1 to the sum of `sizes`.
        sizes: patches of each tile.

    Returns:
        Whole numbers that add up to `keep`, none larger than its size.
    """
    total = sum(sizes)
    shares = [keep * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(keep * sizes[index] % total))
    for index in by_remainder[: keep - sum(shares)]:
        shares[index] += 1
    return shares


@lru_cache(maxsize=4096)
def _layout(planner: VisionPlanner, height: int, width: int, budget: Budget) -> Layout:
    tiling = planner.shape.tiling
    assert tiling is not None
    places = tiling.places(height, width)
    sizes = [place.crop.num_patches for place in places]
    if planner.config.keep_per == "image":
        keeps = shared_out(min(budget.keep, sum(sizes)), sizes)
    else:
        keeps = [min(budget.keep, size) for size in sizes]
    tiles = tuple(Tile(place, keep) for place, keep in zip(places, keeps, strict=True) if keep)
    before = tiling.num_tokens(height, width)
    if keeps == sizes:
        return Layout(tiles, False, before, before)
    for tile in tiles:
        tile_plan(planner, budget, tile)
    num_newlines = len({tile.place.row for tile in tiles} - {-1})
    return Layout(tiles, True, sum(keeps) + num_newlines, before)
