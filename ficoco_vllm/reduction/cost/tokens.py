"""How many visual tokens each layer sees: the part of a plan that no image and no weight can change."""

from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost.shapes import ModelShape


@dataclass(frozen=True)
class TokenPlan:
    """Visual tokens of one image, layer by layer.

    A reducing layer attends over the count that enters it, and writes that many keys and values; its MLP
    already works on the count that enters the next layer.

    Attributes:
        encoder: patch tokens that enter each executed layer of the tower, and one entry for what leaves the
            last.
        decoder: visual tokens that enter each decoder layer, and one entry for what leaves the last. It
            starts below `encoder[-1]` if tokens are dropped between tower and projector.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    @property
    def mean_visual_tokens(self) -> float:
        """Visual tokens in the KV cache of a layer, averaged over the decoder's layers."""
        return sum(self.decoder[:-1]) / (len(self.decoder) - 1)

    def check(self, shape: ModelShape) -> None:
        """Make sure that the plan fits a model.

        Args:
            shape: the model.

        Raises:
            ValueError: there is not one count for each layer and one for the exit, or a count grows.
        """
        depths = (
            ("encoder", self.encoder, shape.tower.num_executed),
            ("decoder", self.decoder, shape.decoder.num_layers),
        )
        for name, counts, num_layers in depths:
            if len(counts) != num_layers + 1:
                raise ValueError(
                    f"{name}: got {len(counts)} counts, allowed: {num_layers + 1} (layers and exit)"
                )
        for before, after in pairwise((shape.tower.num_patches, *self.encoder, *self.decoder)):
            if not 0 <= after <= before:
                raise ValueError(f"token counts: got {after} after {before}, allowed: 0 to {before}")


def unreduced(shape: ModelShape) -> TokenPlan:
    """The plan of the model as it is.

    Args:
        shape: the model.

    Returns:
        All patches in every layer.

    Source: arXiv:2310.03744.
    """
    return constant(shape, shape.tower.num_patches)


def constant(shape: ModelShape, num_visual_tokens: int) -> TokenPlan:
    """A full tower whose output is cut to a number of tokens, the same in every decoder layer.

    Args:
        shape: the model.
        num_visual_tokens: visual tokens of an image in the decoder.

    Returns:
        The plan.

    Source: arXiv:2402.16363 (the one token count that LLM-Viewer knows).
    """
    tower = (shape.tower.num_patches,) * (shape.tower.num_executed + 1)
    return TokenPlan(tower, (num_visual_tokens,) * (shape.decoder.num_layers + 1))
