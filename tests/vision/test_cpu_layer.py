"""The CPU fast paths against the layer itself."""

from dataclasses import dataclass
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.models.clip import CLIPEncoderLayer

from ficoco_vllm.vision.cpu_layer import in_parts, plain_layer
from ficoco_vllm.vision.tower import EncoderLayer

HEADS, WIDTH = 2, 64
# float32 sums of 64 products; the product of other row counts may sum in another order.
TOLERANCE = 1e-5


class Linear(nn.Linear):
    """Returns a pair as vLLM's linear layers do, and notes its rows."""

    rows = 0

    def forward(self, values: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        self.rows = values.numel() // values.shape[-1]
        return super().forward(values), None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)

    def attn(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value)]
        return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(hidden)[0].chunk(3, dim=-1)))[0]


class Layer(nn.Module):
    """An encoder layer with the names of vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


@pytest.mark.parametrize(
    ("images", "tokens", "rows"), [(1, 577, 580), (1, 1, 4), (3, 11, 36), (2, 577, 1154), (1, 64, 64)]
)
@torch.inference_mode()
def test_equals_the_layer(images: int, tokens: int, rows: int) -> None:
    torch.manual_seed(0)
    layer, hidden = Layer(), torch.randn(images, tokens, WIDTH)
    before = hidden.clone()
    expected = layer(hidden)
    result = plain_layer(cast(CLIPEncoderLayer, layer), hidden)
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=0)
    assert layer.self_attn.qkv_proj.rows == rows
    assert torch.equal(hidden, before)


@dataclass(frozen=True)
class Parts:
    """The parts of a layer (`EncoderLayer`)."""

    layer: Layer
    scale: float = (WIDTH // HEADS) ** -0.5

    def heads(self, hidden: Tensor) -> tuple[Tensor, ...]:
        """See `EncoderLayer`."""
        qkv = self.layer.self_attn.qkv_proj(self.layer.layer_norm1(hidden))[0]
        return qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return self.layer.self_attn.out_proj(mixed)[0]

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return self.layer.mlp(self.layer.layer_norm2(hidden))


@pytest.mark.parametrize(("images", "tokens"), [(1, 577), (3, 11), (2, 1)])
@torch.inference_mode()
def test_a_layer_in_parts(images: int, tokens: int) -> None:
    """In float32, where the attention rounds as the layer's own does."""
    torch.manual_seed(0)
    layer, hidden = Layer(), torch.randn(images, tokens, WIDTH)
    before = hidden.clone()
    result = in_parts(cast(EncoderLayer, Parts(layer)), hidden)
    torch.testing.assert_close(result, layer(hidden), atol=TOLERANCE, rtol=0)
    assert torch.equal(hidden, before)
