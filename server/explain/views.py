"""Parts of an image that the vision tower sees alone: the whole image, or its tiles."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ficoco_vllm.planning.tiles import Layout
from ficoco_vllm.planning.tiling import Place, Tiling
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.server.explain.schema import Box, View
from ficoco_vllm.tracing.chain import joined
from ficoco_vllm.vision.packing import Kept, pack


@dataclass(frozen=True)
class TracedImage:
    """One image under the tower's budget of its request.

    Attributes:
        views: its parts in the order of their tokens, without those that are all padding.
        num_patches: units that show the image, of each part that has a number in a trace.
        num_entering: visual tokens that enter the decoder by plan.
        num_extra: those of them without a patch that no reduction counts: [CLS] or newlines.
        layout: its tiles; None where the tower sees the whole image.
        side: rows and columns of units of a tile.
    """

    views: tuple[View, ...]
    num_patches: tuple[int, ...]
    num_entering: int
    num_extra: int
    layout: Layout | None = None
    places: tuple[Place, ...] = ()
    side: int = 0

    @classmethod
    def of(
        cls, tower: VisionPlanner, budget: Budget, size: tuple[int, int], central_square: float | None
    ) -> "TracedImage":
        """Plan an image.

        Args:
            tower: planner of the vision tower.
            budget: budget of the image.
            size: height and width in pixels.
            central_square: see `Explanation`.
        """
        shape, (height, width) = tower.shape, size
        entering = tower.num_image_tokens(budget, height=height, width=width)
        if shape.tiling is None:
            view = View(first=0, grid=shape.grid, box=_square(height, width, central_square), tile=None)
            return cls((view,), (shape.num_units,), entering, int(shape.with_cls))
        places, layout = shape.tiling.places(height, width), tower.layout(budget, height, width)
        counts = tuple(place.crop.num_units for place in places)
        newlines = len(layout.newline_rows) if layout.reduces else layout.num_before - sum(counts)
        return cls(
            tuple(_views(shape.tiling, places, height, width)),
            counts,
            entering,
            newlines,
            layout,
            places,
            shape.grid[0],
        )

    def complete(self, trace: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add to a trace the tiles that keep nothing, which the tower never sees.

        Args:
            trace: from `Traces.take`.
        """
        tower = [reduction for reduction in trace if reduction["site"] != "decoder"]
        if self.layout is None or not tower:
            return list(trace)
        first = min(tower, key=lambda reduction: int(reduction["layer"]))
        seen = {tile.place.number for tile in self.layout.tiles}
        skipped = [number for number, count in enumerate(self.num_patches) if count and number not in seen]
        nothing = dict.fromkeys(("target", "rows", "columns", "values", "size"), ())
        return [
            *trace,
            *(
                {**first, **nothing, "tile": number, "source": range(self.num_patches[number])}
                for number in skipped
            ),
        ]

    def pack(self, parts: Sequence[Sequence[int]], fresh: Iterator[int]) -> list[int]:
        """Order of the tokens in the decoder; see `tracing.chain.Pack`."""
        if self.layout is None:
            return joined(parts, fresh)
        return self._reduced(parts, fresh) if self.layout.reduces else self._unreduced(parts, fresh)

    def _reduced(self, parts: Sequence[Sequence[int]], fresh: Iterator[int]) -> list[int]:
        """Order of a reduced image: the model's own function, applied to names instead of tokens."""
        assert self.layout is not None
        starts = [0, *accumulate(self.num_patches)]
        kept = []
        for number in (tile.place.number for tile in self.layout.tiles):
            names = torch.tensor(parts[number], dtype=torch.int64)
            position = torch.where(names < starts[-1], names - starts[number], -1)
            kept.append(Kept(names[:, None], position))
        order = pack(self.layout, kept, torch.tensor([-1]), self.side)[:, 0].tolist()
        return [next(fresh) if name < 0 else name for name in order]

    def _unreduced(self, parts: Sequence[Sequence[int]], fresh: Iterator[int]) -> list[int]:
        """Order in stock vLLM: the base view, then line by line across the tiles, a newline after each line."""
        assert self.layout is not None
        if not self.layout.ends_rows:
            return joined(parts, fresh)
        names = list(parts[0])
        rows: dict[int, list[Place]] = {}
        for place in self.places[1:]:
            rows.setdefault(place.row, []).append(place)
        for row in rows.values():
            for line in range(max(place.crop.rows for place in row)):
                for number, *_, crop in row:
                    names += parts[number][line * crop.columns : (line + 1) * crop.columns]
                names.append(next(fresh))
        return names


def _square(height: int, width: int, side: float | None) -> Box:
    """The central square of an image, or all of it."""
    if side is None:
        return 0.0, 0.0, 1.0, 1.0
    across, down = side * min(height, width) / width, side * min(height, width) / height
    return (1 - across) / 2, (1 - down) / 2, across, down


def _views(tiling: Tiling, places: Sequence[Place], height: int, width: int) -> Iterator[View]:
    """The parts of an image where they lie, without those that are all padding."""
    first = 0
    for place in places:
        crop = place.crop
        if not crop.num_units:
            continue
        tile = None if place.row < 0 else (place.row, place.column)
        box = tiling.box(place, height, width)
        yield View(first=first, grid=(crop.rows, crop.columns), box=box, tile=tile)
        first += crop.num_units
