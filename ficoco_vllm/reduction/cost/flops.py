"""FLOPs of the prefill of a vision-language model, layer by layer. A multiply-add is 2 FLOPs.

Only matrix products are counted; norms, activations, softmax, RoPE and biases are below 0.5% together. Attention is
counted over the full square of tokens, also in the causal decoder, as the paper and its tool do. A reducing layer
drops tokens between its attention and its MLP: it attends over `tokens_in` and its MLP sees `tokens_out`.
"""

from dataclasses import dataclass

from ficoco_vllm.reduction.cost.shapes import DecoderShape, ModelShape, TowerShape


@dataclass(frozen=True)
class LayerFlops:
    """One layer's FLOPs: query, key, value and output projections, attention products, MLP."""

    projections: int
    attention: int
    mlp: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.projections + self.attention + self.mlp


def tower_layer(shape: TowerShape, tokens_in: int, tokens_out: int) -> LayerFlops:
    """One layer of the vision tower for one image or tile.

    Args:
        shape: the tower.
        tokens_in: units that enter the layer; it runs on their patches and on [CLS] if there is one.
        tokens_out: units after the reduction between attention and MLP.

    Returns:
        FLOPs: projections 8 n D^2, attention 4 n^2 D, MLP of two matrices 4 m D H.

    Source: arXiv:2411.17686, Eq. 16 (first line, doubled).
    """
    n, m = shape.rows(tokens_in), shape.rows(tokens_out)
    return LayerFlops(
        projections=8 * n * shape.hidden**2,
        attention=4 * n**2 * shape.hidden,
        mlp=4 * m * shape.hidden * shape.mlp,
    )


def decoder_layer(shape: DecoderShape, tokens_in: int, tokens_out: int) -> LayerFlops:
    """One layer of the decoder.

    Args:
        shape: the decoder.
        tokens_in: visual and text tokens that enter the layer.
        tokens_out: visual and text tokens after the reduction between attention and MLP.

    Returns:
        FLOPs: projections 4 n D (Q + KV) for query width Q and key width KV, attention 4 n^2 Q,
        gated MLP of three matrices 6 m D H, choice among E experts 2 m D E.

    Source: arXiv:2411.17686, Eq. 17.
    Deviation: Eq. 17 counts a multiply-add once and the MLP with two matrices; Llama's has three.
    """
    n, m = tokens_in, tokens_out
    return LayerFlops(
        projections=4 * n * shape.hidden * (shape.query_width + shape.kv_width),
        attention=4 * n**2 * shape.query_width,
        mlp=2 * m * shape.hidden * (3 * shape.mlp + shape.num_experts),
    )


def patch_embedding(shape: TowerShape, num_patches: int) -> int:
    """The patch convolution of one image or tile: 2 N (3 f p^2) D FLOPs for patches of p x p pixels in f frames.

    Args:
        shape: the tower.
        num_patches: N, padding included.

    Returns:
        FLOPs.

    Source: arXiv:2010.11929, Eq. 1.
    """
    return 2 * num_patches * shape.patch_elements * shape.hidden


def projector(shape: ModelShape, num_visual_tokens: int) -> int:
    """The two-layer projector from a unit's width V to the decoder's width D: 2 K (V I + I D) FLOPs.

    I, the width between the layers, is D in LLaVA and InternVL and V in Qwen3-VL.

    Args:
        shape: the model.
        num_visual_tokens: K, units that it runs on, after all layers of the tower together.

    Returns:
        FLOPs.

    Source: arXiv:2310.03744, Section 3.3.
    """
    return 2 * num_visual_tokens * projector_weights(shape)


def projector_weights(shape: ModelShape) -> int:
    """Elements of the projector's two matrices.

    Args:
        shape: the model.
    """
    unit = shape.tower.unit * shape.tower.hidden
    return shape.projector.inner * (unit + shape.decoder.hidden)


def language_head(shape: DecoderShape) -> int:
    """The language head for the last token, the only one whose logits a prefill needs: 2 D V FLOPs.

    Args:
        shape: the decoder.

    Returns:
        FLOPs.

    Source: arXiv:2302.13971.
    """
    return 2 * shape.hidden * shape.vocab
