"""Visual token counts of each layer: the part of a plan that depends on no image and no weight.

Counts of the tower are units: groups of patches that become one token, single patches in LLaVA.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost.shapes import ModelShape


@dataclass(frozen=True)
class TilePlan:
    """One tile in the tower, which is the whole image unless the model cuts images into tiles.

    Attributes:
        layers: units that enter each executed layer, and those that its MLP works on.
        entering: units that show the image; the others, padding, leave before the first layer that reduces.
        kept: tokens that are left after the tower and any reduction on its features.
    """

    layers: tuple[tuple[int, int], ...]
    entering: int
    kept: int

    @classmethod
    def of(cls, num_units: int, counts: Sequence[int], kept: int) -> "TilePlan":
        """A tile from the counts of its units that show the image.

        Args:
            num_units: number of units of a whole tile, padding included.
            counts: units that enter each executed layer if there were no padding, and those that leave the last.
            kept: tokens after a reduction on the features, otherwise the last of `counts`.
        """
        num_layers = len(counts) - 1
        first = next(
            (index for index in range(num_layers) if counts[index] != counts[index + 1]), num_layers - 1
        )
        if kept == counts[0]:
            first = num_layers  # a tile that loses no patch goes through whole
        whole = ((num_units, num_units),) * first
        return cls((*whole, *list(pairwise(counts))[first:]), counts[0], kept)


@dataclass(frozen=True)
class TokenPlan:
    """Visual tokens of one image, layer by layer.

    A reducing layer attends over the count that enters it, and writes that many keys and values; its MLP
    already works on the count that enters the next layer.

    Attributes:
        tiles: tiles of the image in the tower.
        projected: tokens of the tower's output that go through the projector.
        decoder: visual tokens that enter each decoder layer, and one entry for the last one's output.
    """

    tiles: tuple[TilePlan, ...]
    projected: int
    decoder: tuple[int, ...]

    @classmethod
    def whole(cls, encoder: Iterable[int], decoder: Iterable[int]) -> "TokenPlan":
        """An image that the tower sees as one tile.

        Args:
            encoder: units that enter each executed layer of the tower, and one for the last one's output.
            decoder: see the attributes. It starts below the last of `encoder` if tokens are dropped between tower and
                projector.
        """
        layers, decoder = tuple(pairwise(encoder)), tuple(decoder)
        return cls((TilePlan(layers, layers[0][0], decoder[0]),), decoder[0], decoder)

    @property
    def encoder(self) -> tuple[int, ...]:
        """Units of the first tile that enter each executed layer, and those that leave the last."""
        layers = self.tiles[0].layers
        return (*(entering for entering, _ in layers), layers[-1][1])

    def tower_tokens(self, shape: ModelShape) -> tuple[tuple[int, int], ...]:
        """Patch and [CLS] tokens of all tiles that enter each executed layer, and those that its MLP works on.

        Args:
            shape: sizes of the model.
        """
        layers, rows = zip(*(tile.layers for tile in self.tiles), strict=True), shape.tower.rows
        return tuple((sum(rows(n) for n, _ in tiles), sum(rows(m) for _, m in tiles)) for tiles in layers)

    def num_projected(self, shape: ModelShape) -> int:
        """Units that the projector runs on, after all layers of the tower together.

        Args:
            shape: sizes of the model.
        """
        earlier = sum(tile.layers[layer][1] for tile in self.tiles for layer in shape.projector.layers)
        return self.projected + earlier

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens in the KV cache of a layer, averaged over the decoder's layers."""
        return sum(self.decoder[:-1]) / (len(self.decoder) - 1)

    def check(self, shape: ModelShape) -> None:
        """Raise unless the plan fits a model.

        Args:
            shape: sizes of the model.

        Raises:
            ValueError: there is not one count for each layer and one for the exit, or a count grows.
        """
        depths = [("encoder", len(tile.layers), shape.tower.num_executed) for tile in self.tiles]
        for name, got, num_layers in (*depths, ("decoder", len(self.decoder) - 1, shape.decoder.num_layers)):
            if got != num_layers:
                raise ValueError(f"{name}: got {got + 1} counts, allowed: {num_layers + 1} (layers and exit)")
        for tile in self.tiles:
            most = tile.entering if shape.tower.dynamic else shape.tower.num_units
            _check_falling((most, *(n for pair in tile.layers for n in pair), tile.kept))
        _check_falling(self.decoder)


def unreduced(shape: ModelShape) -> TokenPlan:
    """The plan of the model as it is.

    Args:
        shape: sizes of the model.

    Returns:
        All units in every layer, of the largest image where the grid follows the image's size.

    Source: arXiv:2310.03744.
    """
    return constant(shape, shape.tower.num_units)


def constant(shape: ModelShape, num_visual_tokens: int) -> TokenPlan:
    """A full tower whose output is cut to a number of tokens, the same in every decoder layer.

    Args:
        shape: sizes of the model.
        num_visual_tokens: visual tokens of an image in the decoder.

    Returns:
        The plan.

    Source: arXiv:2402.16363 (LLM-Viewer has a single token count).
    """
    tower = (shape.tower.num_units,) * (shape.tower.num_executed + 1)
    return TokenPlan.whole(tower, (num_visual_tokens,) * (shape.decoder.num_layers + 1))


def _check_falling(counts: Sequence[int]) -> None:
    for before, after in pairwise(counts):
        if not 0 <= after <= before:
            raise ValueError(f"token counts: got {after} after {before}, allowed: 0 to {before}")
