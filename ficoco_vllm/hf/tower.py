"""transformers' CLIP tower as `encode` runs it."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ficoco_vllm.vision.tower import Tower


@dataclass(frozen=True)
class HfLayer:
    """One encoder layer (`EncoderLayer`). Its modules are called whole, so adapters and quantized weights work.

    Attributes:
        layer: transformers' `CLIPEncoderLayer`.
    """

    layer: Any
    all_reduce: None = None

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.self_attn.scale)

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        return int(self.layer.self_attn.num_heads)

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer(hidden, None)
        return output

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`."""
        attention = self.layer.self_attn
        normed = self.layer.layer_norm1(hidden)
        query, key, value = (
            project(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        projected: Tensor = self.layer.self_attn.out_proj(mixed)
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer.mlp(self.layer.layer_norm2(hidden))
        return output


class HfTower(Tower):
    """The tower up to the layer that LLaVA reads (`Tower`)."""

    def __init__(self, tower: Any, num_layers: int) -> None:
        """Share the modules of a tower.

        Args:
            tower: transformers' `CLIPVisionModel`.
            num_layers: number of layers that run.
        """
        self.tower = tower
        self.layers = [HfLayer(layer) for layer in tower.encoder.layers[:num_layers]]

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        embedded: Tensor = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        return embedded

    def features(self, pixels: Tensor) -> Tensor:
        """Patch features without a reduction, (B, 3, height, width) to (B, N, D)."""
        hidden = self.embed(pixels)
        for layer in self.layers:
            hidden = layer.whole(hidden)
        return hidden[:, 1:]
