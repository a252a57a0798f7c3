"""vLLM's CLIP tower as `encode` runs it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models.clip import CLIPEncoderLayer, CLIPVisionTransformer

from ficoco_vllm.vision.cpu_layer import plain_layer
from ficoco_vllm.vision.tower import Tower


@dataclass(frozen=True)
class VllmLayer:
    """One encoder layer (`EncoderLayer`).

    Attributes:
        layer: vLLM's.
    """

    layer: CLIPEncoderLayer

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.self_attn.scale)

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        return int(self.layer.self_attn.num_heads)

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor] | None:
        """See `EncoderLayer`."""
        return tensor_model_parallel_all_reduce if self.layer.self_attn.tp_size > 1 else None

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return plain_layer(self.layer, hidden)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`; the heads of this rank."""
        attention = self.layer.self_attn
        qkv, _ = attention.qkv_proj(self.layer.layer_norm1(hidden))
        heads = qkv.unflatten(-1, (3, attention.num_heads_per_partition, attention.head_dim))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        projected: Tensor = self.layer.self_attn.out_proj(mixed)[0]
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        output: Tensor = self.layer.mlp(self.layer.layer_norm2(hidden))
        return output


class VllmTower(Tower):
    """The tower, built up to the layer that LLaVA reads (`Tower`)."""

    def __init__(self, tower: CLIPVisionTransformer) -> None:
        """Share the modules of a tower.

        Args:
            tower: vLLM's.
        """
        self.tower = tower
        self.layers = [VllmLayer(layer) for layer in tower.encoder.layers]

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        embedded: Tensor = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        return embedded
