"""Cost of one prefill under a token plan: FLOPs, KV cache and memory, and the gain over no reduction."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost import flops, paper
from ficoco_vllm.reduction.cost.llm_viewer import traffic_bytes
from ficoco_vllm.reduction.cost.memory import activation_bytes, kv_bytes, num_parameters, to_bytes
from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.cost.tokens import TilePlan, TokenPlan


@dataclass(frozen=True)
class Estimate:
    """The cost of one prefill. FLOPs count a multiply-add as 2 and do not depend on the data type.

    For every method, the reduction itself is counted by Eqs. 18 and 19, those of FiCoCo.
    """

    tower_flops: int
    projector_flops: int
    decoder_flops: int
    reduction_flops: int
    kv_bytes_per_layer: tuple[int, ...]
    weight_bytes: int
    activation_bytes: int
    llm_traffic_bytes: int

    @property
    def total_flops(self) -> int:
        """Everything from pixels to the first token, the reduction's own work included."""
        return self.tower_flops + self.projector_flops + self.decoder_flops + self.reduction_flops

    @property
    def kv_bytes(self) -> int:
        """KV cache of the prompt."""
        return sum(self.kv_bytes_per_layer)

    @property
    def memory_bytes(self) -> int:
        """Weights, KV cache and peak activations together."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


@dataclass(frozen=True)
class Speedup:
    """Speed-up of the prefill: two bounds, between which the hardware decides.

    Attributes:
        compute_bound: ratio of all FLOPs; reached where arithmetic is the limit (long prompts, batches).
        memory_bound: ratio of the bytes that the decoder moves; reached where bandwidth is the limit.
    """

    compute_bound: float
    memory_bound: float


def estimate(
    shape: ModelShape, plan: TokenPlan, *, num_text_tokens: int, num_images: int = 1, dtype: str = "fp16"
) -> Estimate:
    """Add up one prefill with images that follow one plan.

    Args:
        shape: sizes of the model.
        plan: plan of each image.
        num_text_tokens: M, text tokens of the prompt.
        num_images: images in the prompt, each reduced alone.
        dtype: data type of weights, activations and KV cache.

    Returns:
        The cost.

    Raises:
        ValueError: the plan does not fit the model, or a number is out of range.

    Source: arXiv:2411.17686, Section 9 and Tables 8 to 10.
    """
    return estimate_prompt(shape, {plan: num_images}, num_text_tokens=num_text_tokens, dtype=dtype)


def estimate_prompt(
    shape: ModelShape, images: Mapping[TokenPlan, int], *, num_text_tokens: int, dtype: str = "fp16"
) -> Estimate:
    """Add up one prefill; see `estimate`.

    Args:
        shape: sizes of the model.
        images: the plans of the prompt's images, each with the number of images that follow it.
        num_text_tokens: M.
        dtype: data type of weights, activations and KV cache.
    """
    if num_text_tokens < 1:
        raise ValueError(f"num_text_tokens: got {num_text_tokens}, allowed: at least 1")
    for plan, count in images.items():
        if count < 1:
            raise ValueError(f"num_images: got {count}, allowed: at least 1")
        plan.check(shape)

    def total(values: Iterable[int]) -> int:
        return sum(count * value for count, value in zip(images.values(), values, strict=True))

    decoder_layers = zip(*(plan.decoder for plan in images), strict=True)
    decoder_tokens = [num_text_tokens + total(layer) for layer in decoder_layers]
    tower_layers = zip(*(plan.tower_tokens(shape) for plan in images), strict=True)
    tower_tokens = [(total(n for n, _ in layer), total(m for _, m in layer)) for layer in tower_layers]
    return Estimate(
        tower_flops=total(sum(_tower_flops(shape, tile) for tile in plan.tiles) for plan in images),
        projector_flops=flops.projector(shape, total(plan.num_projected(shape) for plan in images)),
        decoder_flops=_decoder_flops(shape, decoder_tokens),
        reduction_flops=total(_reduction_flops(shape, plan) for plan in images),
        kv_bytes_per_layer=kv_bytes(shape.decoder, decoder_tokens[:-1], dtype),
        weight_bytes=to_bytes(num_parameters(shape), dtype),
        activation_bytes=activation_bytes(shape, tower_tokens, decoder_tokens, dtype),
        llm_traffic_bytes=traffic_bytes(shape.decoder, decoder_tokens, dtype, fused_attention=True),
    )


def speedup(reduced: Estimate, unreduced: Estimate) -> Speedup:
    """Bounds of the prefill's speed-up.

    Args:
        reduced: cost under the plan.
        unreduced: cost of the same prompt without reduction.

    Returns:
        The two bounds.

    Source: arXiv:2402.16363, Section 2 (roofline).
    """
    return Speedup(
        compute_bound=unreduced.total_flops / reduced.total_flops,
        memory_bound=unreduced.llm_traffic_bytes / reduced.llm_traffic_bytes,
    )


def _tower_flops(shape: ModelShape, tile: TilePlan) -> int:
    layers = sum(flops.tower_layer(shape.tower, *counts).total for counts in tile.layers)
    tower = shape.tower
    num_patches = tile.entering * tower.unit if tower.dynamic else tower.num_patches
    return flops.patch_embedding(tower, num_patches) + layers


def _decoder_flops(shape: ModelShape, tokens: Sequence[int]) -> int:
    layers = sum(flops.decoder_layer(shape.decoder, *counts).total for counts in pairwise(tokens))
    return layers + flops.language_head(shape.decoder)


def _reduction_flops(shape: ModelShape, image: TokenPlan) -> int:
    tower, width = 0, shape.tower.unit * shape.tower.hidden
    for tile in image.tiles:
        # The step from the tower's output to the kept tokens is a reduction at the feature site.
        steps = [*tile.layers, (tile.layers[-1][1], tile.kept)] if tile.kept != tile.entering else []
        tower += sum(paper.encoder_overhead(n, n - m, width) for n, m in steps)
    decoder = pairwise(image.decoder)
    return tower + sum(paper.decoder_overhead(n, n - m, shape.decoder.hidden) for n, m in decoder)
