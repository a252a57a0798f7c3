"""Sizes of a vision-language model that determine its cost. `configurations.py` reads them from a config.json."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TowerShape:
    """The executed part of a vision tower.

    A unit is the group of patches that becomes one visual token.

    Attributes:
        image_size: height and width in pixels of an image or of a tile; of the largest square image where the grid
            follows the image's size.
        patch_size: height and width in pixels of a patch.
        hidden: width.
        num_heads: number of attention heads.
        mlp: width between the MLP's two matrices.
        num_layers: number of layers of the checkpoint.
        num_executed: layers up to the one whose output the model reads: 23 of 24 for LLaVA's feature layer -2.
        unit: patches of a unit: 1 in LLaVA, 4 where 2 x 2 patches become one token.
        num_extra: tokens other than the patches: [CLS].
        frames: that a patch spans; an image is repeated.
        dynamic: whether the grid follows the image's size.
        layer_small: parameters of a layer other than its six matrices: biases, norms, scales.
        small: parameters outside of layers and patch embedding: [CLS], table of positions, norms, embedding bias.
    """

    image_size: int
    patch_size: int
    hidden: int
    num_heads: int
    mlp: int
    num_layers: int
    num_executed: int
    unit: int = 1
    num_extra: int = 1
    frames: int = 1
    dynamic: bool = False
    layer_small: int = 0
    small: int = 0

    @property
    def num_patches(self) -> int:
        """Patches of an image or of a tile, of the largest one where the grid follows the image's size."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_units(self) -> int:
        """Visual tokens of an image or of a tile before any reduction, [CLS] not counted."""
        return self.num_patches // self.unit

    @property
    def patch_elements(self) -> int:
        """Numbers in a patch: three colours of its pixels, in each of its frames."""
        return 3 * self.frames * self.patch_size**2

    def rows(self, num_units: int) -> int:
        """Tokens of the tower for a number of units: their patches, and [CLS] if there is one."""
        return num_units * self.unit + self.num_extra


@dataclass(frozen=True)
class ProjectorShape:
    """The two layers that turn a unit of the tower's width into one token of the decoder's.

    Attributes:
        inner: width between the two layers.
        layers: layers of the tower, counted from 0, after which it also runs, each time with weights of its own; their
            results are added in the first layers of the decoder (Qwen3-VL's deepstack).
        small: parameters other than the matrices, all runs together.
    """

    inner: int
    layers: tuple[int, ...] = ()
    small: int = 0


@dataclass(frozen=True)
class DecoderShape:
    """A decoder of Llama's kind: gated MLP of three matrices.

    Attributes:
        hidden: width.
        num_layers: number of layers.
        num_heads: query heads.
        num_kv_heads: heads of keys, and of values.
        head_dim: width of a head.
        mlp: width of the gate; in a mixture of experts of those that a token passes, together.
        vocab: tokens.
        tied_head: whether the language head is the table of embeddings.
        layer_small: parameters of a layer other than its seven matrices: norms, biases.
        num_experts: number of experts of a layer; 0 without.
        experts_per_token: that a token passes.
    """

    hidden: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    tied_head: bool
    layer_small: int = 0
    num_experts: int = 0
    experts_per_token: int = 1

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.num_kv_heads * self.head_dim

    def mlp_weights(self, num_tokens: float = math.inf) -> float:
        """Parameters of the MLP's matrices in a layer, and of the matrix that chooses the experts.

        Args:
            num_tokens: tokens of a step, each of which chooses its experts; the result is the mean over random choices.
        """
        share = 1.0
        if self.num_experts:
            missed = (1 - self.experts_per_token / self.num_experts) ** num_tokens
            share = self.num_experts / self.experts_per_token * (1 - missed)
        return self.hidden * (3 * self.mlp * share + self.num_experts)


@dataclass(frozen=True)
class ModelShape:
    """Vision tower, decoder, and the projector between them."""

    tower: TowerShape
    decoder: DecoderShape
    projector: ProjectorShape
