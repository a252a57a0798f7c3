"""LLM-Viewer's accounting of one decoder prefill; the paper's efficiency tables were made with that tool.

It has two figures that may be called memory. *Traffic* is every byte that the prefill's operators load or
store, layer after layer, without operator fusion and with the score matrix written out. *Footprint* is the memory
held at the same time: weights, KV cache and the outputs of one layer. The vision tower, the projector and the
input embeddings are in neither. docs/paper-tables.md shows which of the paper's figures are which.
"""

from collections.abc import Sequence
from itertools import pairwise

from ficoco_vllm.reduction.cost.memory import to_bytes
from ficoco_vllm.reduction.cost.shapes import DecoderShape


def traffic_bytes(
    shape: DecoderShape, tokens: Sequence[int], dtype: str, *, fused_attention: bool = False
) -> int:
    """Bytes that a prefill moves between memory and cores.

    Args:
        shape: the decoder.
        tokens: visual and text tokens that enter each layer, and one entry for the last one's output.
        dtype: data type of weights, activations and KV cache.
        fused_attention: leave out the score matrix, which fused attention kernels never write.

    Returns:
        Bytes.

    Source: arXiv:2402.16363, Section 2.
    Deviation: the tool has a single token count for all layers; here the attention's and the MLP's may
    differ.
    """
    # Scores are stored by the first product and the softmax, loaded by the softmax and the second product.
    passes = 0 if fused_attention else 4
    layers = sum(
        _layer_weights(shape) + _loads(shape, n, m) + _stores(shape, n, m) + passes * _scores(shape, n)
        for n, m in pairwise(tokens)
    )
    head = shape.hidden * shape.vocab + shape.hidden + shape.vocab
    return to_bytes(head + layers, dtype)


def footprint_bytes(shape: DecoderShape, tokens: Sequence[int], dtype: str) -> int:
    """Bytes held at the same time: weights of all layers, KV cache, and the largest output of a layer.

    Args:
        shape: the decoder.
        tokens: visual and text tokens that enter each layer, and one entry for the last one's output.
        dtype: data type of weights, activations and KV cache.

    Returns:
        Bytes; the language head is left out, as in the tool.

    Source: arXiv:2402.16363, Section 2.
    """
    pairs = list(pairwise(tokens))
    kv_cache = sum(_kv(shape, n) for n, _ in pairs)
    busiest = max(_stores(shape, n, m) - _kv(shape, n) + 2 * _scores(shape, n) for n, m in pairs)
    return to_bytes(shape.num_layers * _layer_weights(shape) + kv_cache + busiest, dtype)


def _layer_weights(shape: DecoderShape) -> int:
    return 2 * shape.hidden * (shape.query_width + shape.kv_width) + round(shape.mlp_weights())


def _loads(shape: DecoderShape, n: int, m: int) -> int:
    attention = (
        6 * n * shape.hidden + 3 * n * shape.kv_width
    )  # four projections, norm, residual; keys (twice), values
    mlp = (
        6 * m * shape.hidden + m * shape.mlp
    )  # gate, up, both factors of their product, norm, residual; down
    return attention + mlp


def _stores(shape: DecoderShape, n: int, m: int) -> int:
    attention = 5 * n * shape.hidden + _kv(
        shape, n
    )  # query, weighted values, output, norm, residual; KV cache
    # The product of gate and up is stored with width D, as the tool does, although it has width H.
    mlp = 4 * m * shape.hidden + 2 * m * shape.mlp  # product, down, norm, residual; gate, up
    return attention + mlp


def _kv(shape: DecoderShape, n: int) -> int:
    return 2 * n * shape.kv_width


def _scores(shape: DecoderShape, n: int) -> int:
    return int(shape.num_heads * n**2)
