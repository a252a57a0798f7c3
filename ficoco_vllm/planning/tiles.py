"""Distribution of a budget over the tiles of an image: integers, no pixels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ficoco_vllm.planning.tiling import Place, Tiling


class Tile(NamedTuple):
    """A tile that keeps tokens.

    Attributes:
        place: in the image.
        keep: tokens that it keeps, at least one.
    """

    place: Place
    keep: int

    @property
    def is_whole(self) -> bool:
        """Whether all units that show the image stay."""
        return self.keep >= self.place.crop.num_units


@dataclass(frozen=True)
class Layout:
    """An image under a budget.

    Attributes:
        tiles: in the order of the image's pixel values; tiles that keep nothing are left out.
        reduces: whether any unit that shows the image leaves. If not, stock vLLM's code handles the image.
        num_tokens: in the prompt: kept tokens, and a newline after each row of tiles that keeps any.
        num_before: the same without reduction, as in stock vLLM.
        ends_rows: see `Tiling`.
    """

    tiles: tuple[Tile, ...]
    reduces: bool
    num_tokens: int
    num_before: int
    ends_rows: bool = False

    @property
    def newline_rows(self) -> tuple[int, ...]:
        """Rows of tiles that end in a newline."""
        return tuple(sorted({tile.place.row for tile in self.tiles} - {-1})) if self.ends_rows else ()

    @classmethod
    def of(
        cls,
        tiling: Tiling,
        places: Sequence[Place],
        keep: Callable[[int], int],
        keep_per: Literal["tile", "image"],
    ) -> "Layout":
        """Distribute a budget over the tiles of an image.

        Args:
            tiling: tiling of the model.
            places: places of the image's tiles.
            keep: maps the units of each tile, or of the image, to the tokens that stay. Padding is never kept: a tile
                that has fewer units than its budget keeps those.
            keep_per: unit of `keep`.
        """
        sizes = [place.crop.num_units for place in places]
        if keep_per == "image":
            keeps = shared_out(keep(sum(sizes)), sizes)
        else:
            keeps = [keep(size) for size in sizes]
        tiles = tuple(Tile(place, keep) for place, keep in zip(places, keeps, strict=True) if keep)
        before = tiling.count(places)
        if keeps == sizes:
            return cls(tiles, False, before, before, tiling.ends_rows)
        num_newlines = len({tile.place.row for tile in tiles} - {-1}) if tiling.ends_rows else 0
        return cls(tiles, True, sum(keeps) + num_newlines, before, tiling.ends_rows)


def shared_out(keep: int, sizes: Sequence[int]) -> list[int]:
    """Divide a budget in proportion to sizes by largest remainders; of equal remainders the first one wins.

    Args:
        keep: 1 to the sum of `sizes`.
        sizes: units of each tile.

    Returns:
        Whole numbers that add up to `keep`, none larger than its size.
    """
    total = sum(sizes)
    shares = [keep * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda index: -(keep * sizes[index] % total))
    for index in by_remainder[: keep - sum(shares)]:
        shares[index] += 1
    return shares
