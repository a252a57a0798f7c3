"""What one prefill costs under a token plan: FLOPs, KV cache and memory, and the gain over no reduction."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ficoco_vllm.reduction.cost import flops, paper
from ficoco_vllm.reduction.cost.llm_viewer import traffic_bytes
from ficoco_vllm.reduction.cost.memory import activation_bytes, kv_bytes, num_parameters, to_bytes
from ficoco_vllm.reduction.cost.shapes import ModelShape
from ficoco_vllm.reduction.cost.tokens import TokenPlan


@dataclass(frozen=True)
class Estimate:
    """The cost of one prefill. FLOPs count a multiply-add as 2 and do not depend on the data type.

    What the reductions cost themselves is counted by Eqs. 18 and 19, those of FiCoCo, for every method.
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
    """How much faster prefill can get: two bounds between which the hardware decides.

    Attributes:
        compute_bound: ratio of all FLOPs; reached where arithmetic is the limit (long prompts, batches).
        memory_bound: ratio of the bytes that the decoder moves; reached where bandwidth is the limit.
    """

    compute_bound: float
    memory_bound: float


def estimate(
    shape: ModelShape, plan: TokenPlan, *, num_text_tokens: int, num_images: int = 1, dtype: str = "fp16"
) -> Estimate:
    """Adds up one prefill.

    Args:
        shape: the model.
        plan: patch and visual tokens of one image, layer by layer.
        num_text_tokens: M, text tokens of the prompt.
        num_images: images in the prompt, each reduced alone.
        dtype: of weights, activations and KV cache.

    Returns:
        The cost.

    Raises:
        ValueError: the plan does not fit the model, or a number is out of range.

    Source: arXiv:2411.17686, Section 9 and Tables 8 and 9.
    """
    check_counts(num_text_tokens, num_images)
    plan.check(shape)
    decoder_tokens = [num_images * visual + num_text_tokens for visual in plan.decoder]
    return Estimate(
        tower_flops=num_images * _tower_flops(shape, plan),
        projector_flops=flops.projector(shape, num_images * plan.decoder[0]),
        decoder_flops=decoder_flops(shape, decoder_tokens),
        reduction_flops=num_images * _reduction_flops(shape, plan),
        kv_bytes_per_layer=kv_bytes(shape.decoder, decoder_tokens[:-1], dtype),
        weight_bytes=to_bytes(num_parameters(shape), dtype),
        activation_bytes=activation_bytes(shape, plan.encoder, decoder_tokens, num_images, dtype),
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


def check_counts(num_text_tokens: int, num_images: int) -> None:
    """Refuse a prompt without text or images.

    Raises:
        ValueError: naming the count and what is allowed.
    """
    if num_text_tokens < 1:
        raise ValueError(f"num_text_tokens: got {num_text_tokens}, allowed: at least 1")
    if num_images < 1:
        raise ValueError(f"num_images: got {num_images}, allowed: at least 1")


def _tower_flops(shape: ModelShape, plan: TokenPlan) -> int:
    layers = sum(flops.tower_layer(shape.tower, *counts).total for counts in pairwise(plan.encoder))
    return flops.patch_embedding(shape.tower) + layers


def decoder_flops(shape: ModelShape, tokens: Sequence[int]) -> int:
    """FLOPs of the decoder and the language head.

    Args:
        shape: the model.
        tokens: visual and text tokens that enter each layer, and those that leave the last.
    """
    layers = sum(flops.decoder_layer(shape.decoder, *counts).total for counts in pairwise(tokens))
    return layers + flops.language_head(shape.decoder)


def _reduction_flops(shape: ModelShape, plan: TokenPlan) -> int:
    # The step from what leaves the tower to what enters the decoder is a reduction at the feature site.
    vision = pairwise((*plan.encoder, plan.decoder[0]))
    encoder = sum(paper.encoder_overhead(n, n - m, shape.tower.hidden) for n, m in vision)
    decoder = sum(paper.decoder_overhead(n, n - m, shape.decoder.hidden) for n, m in pairwise(plan.decoder))
    return encoder + decoder
