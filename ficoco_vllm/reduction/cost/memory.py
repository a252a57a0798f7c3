"""Bytes of weights, KV cache and activations. MB and GB are decimal, as in the paper's tables."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from ficoco_vllm.reduction.cost.flops import projector_weights
from ficoco_vllm.reduction.cost.shapes import DecoderShape, ModelShape

BITS: Mapping[str, int] = {"fp16": 16, "int8": 8, "int4": 4}


def to_bytes(num_elements: int, dtype: str) -> int:
    """Size of `num_elements` stored one after another.

    Args:
        num_elements: count of numbers.
        dtype: "fp16", "int8" or "int4"; scales and zero points of quantisation are not counted.

    Returns:
        Bytes, rounded up.

    Raises:
        ValueError: `dtype` is none of the three.

    Source: arXiv:2411.17686, Tables 8 and 9 (column "Quantization").
    """
    if dtype not in BITS:
        raise ValueError(f"dtype: got {dtype!r}, allowed: {', '.join(BITS)}")
    return -(-num_elements * BITS[dtype] // 8)


def kv_bytes(shape: DecoderShape, tokens_per_layer: Sequence[int], dtype: str) -> tuple[int, ...]:
    """KV cache of one request, layer by layer: tokens x 2 (key and value) x width of the key heads.

    Args:
        shape: the decoder.
        tokens_per_layer: visual and text tokens that enter each layer; a reducing layer still writes all of
            them.
        dtype: data type of the cache.

    Returns:
        Bytes for each layer.

    Source: arXiv:2411.17686, Tables 8 and 9 (column "KV-Cache").
    """
    return tuple(to_bytes(tokens * 2 * shape.kv_width, dtype) for tokens in tokens_per_layer)


def num_parameters(shape: ModelShape) -> int:
    """Parameters that must be loaded: the executed part of the tower, the projector and the decoder.

    Args:
        shape: the model.

    Returns:
        The number, biases, norms and embeddings included.

    Source: arXiv:2310.03744.
    """
    tower, decoder, projector = shape.tower, shape.decoder, shape.projector
    width, hidden = tower.hidden, decoder.hidden
    tower_layer = 4 * width**2 + 2 * width * tower.mlp + tower.layer_small
    attention = 2 * hidden * (decoder.query_width + decoder.kv_width)
    decoder_layer = attention + round(decoder.mlp_weights()) + decoder.layer_small
    vocabulary = decoder.vocab * hidden * (1 if decoder.tied_head else 2)
    return (
        tower.patch_elements * width
        + tower.small
        + tower.num_executed * tower_layer
        + (1 + len(projector.layers)) * projector_weights(shape)
        + projector.small
        + decoder.num_layers * decoder_layer
        + hidden
        + vocabulary
    )


def activation_bytes(
    shape: ModelShape, tower_tokens: Sequence[tuple[int, int]], decoder_tokens: Sequence[int], dtype: str
) -> int:
    """Peak of the activations of one prefill, with attention kernels that keep no score matrix.

    A layer holds its residual stream and either query, key, value and output, or the MLP's inner tensors
    (one of width H in CLIP, three in Llama's gated MLP). The peak is that of the widest layer of tower and
    decoder.

    Args:
        shape: sizes of the model.
        tower_tokens: patch and [CLS] tokens of all tiles, which run as one batch, that enter each executed layer, and
            those that its MLP works on.
        decoder_tokens: visual and text tokens that enter each layer, and one entry for the output.
        dtype: data type of the activations.

    Returns:
        Bytes.

    Source: arXiv:2205.14135 (attention without the score matrix).
    """
    tower, decoder = shape.tower, shape.decoder
    peaks = [max(5 * n * tower.hidden, m * (tower.hidden + tower.mlp)) for n, m in tower_tokens]
    for n, m in pairwise(decoder_tokens):
        attention = n * (decoder.hidden + 2 * decoder.query_width + 2 * decoder.kv_width)
        peaks.append(max(attention, m * (decoder.hidden + 3 * decoder.mlp)))
    return to_bytes(max(peaks), dtype)
