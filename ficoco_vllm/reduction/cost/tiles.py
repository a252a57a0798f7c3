"""What a prefill costs whose images are cut into tiles (LLaVA-NeXT), each seen by the tower alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost import flops, paper
from ficoco_vllm.reduction.cost.estimate import Estimate, check_counts, decoder_flops
from ficoco_vllm.reduction.cost.llm_viewer import traffic_bytes
from ficoco_vllm.reduction.cost.memory import activation_bytes, kv_bytes, num_parameters, to_bytes
from ficoco_vllm.reduction.cost.shapes import ModelShape


@dataclass(frozen=True)
class TilePlan:
    """One tile on its way through the tower.

    Attributes:
        layers: patch tokens that enter each executed layer, and those that its MLP works on.
        entering: patches that show the image; the others, padding, leave before the first layer that reduces.
        kept: tokens that are left, and go through the projector.
    """

    layers: tuple[tuple[int, int], ...]
    entering: int
    kept: int

    @classmethod
    def of(cls, num_patches: int, counts: Sequence[int], kept: int) -> "TilePlan":
        """A tile from the counts of its patches that show the image.

        Args:
            num_patches: of a whole tile, padding included.
            counts: patch tokens that enter each executed layer, had the padding never been there, and those that leave
                the last.
            kept: what is left behind a reduction on the features, otherwise the last of `counts`.
        """
        num_layers = len(counts) - 1
        first = next(
            (index for index in range(num_layers) if counts[index] != counts[index + 1]), num_layers - 1
        )
        if kept == counts[0]:
            first = num_layers  # a tile from which no patch leaves goes through whole
        whole = ((num_patches, num_patches),) * first
        return cls((*whole, *list(pairwise(counts))[first:]), counts[0], kept)


@dataclass(frozen=True)
class TiledPlan:
    """A prompt.

    Attributes:
        tiles: of all images.
        projected: tokens that go through the projector.
        decoder: visual tokens of all images, newlines counted, that enter each decoder layer, and those that leave the
            last.
    """

    tiles: tuple[TilePlan, ...]
    projected: int
    decoder: tuple[int, ...]


def estimate_tiles(
    shape: ModelShape, plan: TiledPlan, *, num_text_tokens: int, dtype: str = "fp16"
) -> Estimate:
    """Adds up one prefill.

    Args:
        shape: the model.
        plan: of its images.
        num_text_tokens: M, text tokens of the prompt.
        dtype: of weights, activations and KV cache.

    Returns:
        The cost.

    Raises:
        ValueError: a number is out of range.

    Source: arXiv:2411.17686, Section 9 and Table 10.
    """
    check_counts(num_text_tokens, len(plan.tiles))
    decoder_tokens = [visual + num_text_tokens for visual in plan.decoder]
    whole = (shape.tower.num_patches,) * (shape.tower.num_executed + 1)
    return Estimate(
        tower_flops=sum(_tower_flops(shape, tile) for tile in plan.tiles),
        projector_flops=flops.projector(shape, plan.projected),
        decoder_flops=decoder_flops(shape, decoder_tokens),
        reduction_flops=_reduction_flops(shape, plan),
        kv_bytes_per_layer=kv_bytes(shape.decoder, decoder_tokens[:-1], dtype),
        weight_bytes=to_bytes(num_parameters(shape), dtype),
        activation_bytes=activation_bytes(shape, whole, decoder_tokens, len(plan.tiles), dtype),
        llm_traffic_bytes=traffic_bytes(shape.decoder, decoder_tokens, dtype, fused_attention=True),
    )


def _tower_flops(shape: ModelShape, tile: TilePlan) -> int:
    layers = sum(flops.tower_layer(shape.tower, *counts).total for counts in tile.layers)
    return flops.patch_embedding(shape.tower) + layers


def _reduction_flops(shape: ModelShape, plan: TiledPlan) -> int:
    encoder = 0
    for tile in plan.tiles:
        steps = [*tile.layers, (tile.layers[-1][1], tile.kept)] if tile.kept != tile.entering else []
        encoder += sum(paper.encoder_overhead(n, n - m, shape.tower.hidden) for n, m in steps)
    decoder = sum(paper.decoder_overhead(n, n - m, shape.decoder.hidden) for n, m in pairwise(plan.decoder))
    return encoder + decoder
