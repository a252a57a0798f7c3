"""Compact Llama decoder and projector with Hugging Face's mathematics and weights."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.architecture import ARCHITECTURE, Architecture, attend
from tools.demo_model.muon import MatrixGroup
from tools.demo_model.vision import Linear

STD = 0.09
SHARED_QK = 0.8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation of the last dimension, computed in fp32 as Llama does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight.to(x.dtype)


class DecoderLayer(nn.Module):
    """One Llama layer; query, key, value and gate, up are stacked.

    Query and key are initialised with a shared part, so that attention starts from similarity of content. The matrices
    that write into the residual stream start small, or at zero in a layer inserted into a trained decoder.
    """

    def __init__(self, sizes: Architecture, num_layers: int, silent: bool = False) -> None:
        super().__init__()
        D, H = sizes.hidden_size, sizes.decoder_mlp
        shared = torch.randn(D, D)
        query, key = (
            math.sqrt(1 - SHARED_QK) * torch.randn(D, D) + math.sqrt(SHARED_QK) * shared for _ in range(2)
        )
        scale = 0.0 if silent else 1 / math.sqrt(2 * num_layers)
        self.qkv = nn.Parameter(torch.cat([query, key, torch.randn(D, D)]) * STD)
        self.out = nn.Parameter(torch.randn(D, D) * STD * scale)
        self.gate_up = nn.Parameter(torch.randn(2 * H, D) * STD)
        self.down = nn.Parameter(torch.randn(D, H) * STD * math.sqrt(D / H) * scale)
        self.norm1, self.norm2 = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.num_heads, self.eps = sizes.num_heads, sizes.decoder_norm_eps

    def project(self, x: Tensor, rotate: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of (B, T, D), each (B, H, T, d), with rotary positions applied."""
        B, T, _ = x.shape
        normed = rms_norm(x, self.norm1, self.eps)
        qkv = F.linear(normed, self.qkv.to(x.dtype)).view(B, T, 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        return turn(query, rotate), turn(key, rotate), value

    def log_attention(self, x: Tensor, rotate: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Logarithm of the attention of `forward`, (B, H, T, T), fp32."""
        query, key, _ = self.project(x, rotate)
        logits = (query @ key.mT).float() * query.shape[-1] ** -0.5 + bias.float()
        return logits.log_softmax(dim=-1)

    def forward(self, x: Tensor, rotate: tuple[Tensor, Tensor], bias: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D) under an additive attention mask."""
        kind = x.dtype
        query, key, value = self.project(x, rotate)
        x = x + F.linear(attend(query, key, value, bias), self.out.to(kind))
        gate, up = F.linear(rms_norm(x, self.norm2, self.eps), self.gate_up.to(kind)).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down.to(kind))


def turn(x: Tensor, rotate: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on (B, H, T, d).

    Source: Su et al., arXiv:2104.09864, Eq. 34, in Llama's order of dimensions.
    """
    cos, sin = rotate
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Decoder(nn.Module):
    """Llama without its projector.

    Args:
        sizes: widths.
        num_layers: initial number of layers.
    """

    def __init__(self, vocabulary: int, num_layers: int, sizes: Architecture = ARCHITECTURE) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Parameter(torch.randn(vocabulary, sizes.hidden_size) * STD)
        self.layers = nn.ModuleList(DecoderLayer(sizes, num_layers) for _ in range(num_layers))
        self.norm = nn.Parameter(torch.ones(sizes.hidden_size))
        self.head = nn.Parameter(torch.randn(vocabulary, sizes.hidden_size) * 0.02)

    def forward(
        self, x: Tensor, position: Tensor, bias: Tensor, watch: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run all layers and the last norm.

        Args:
            x: embeddings, (B, T, D), bf16 or fp32.
            position: rotary positions, (B, T), int64.
            bias: 0 where attention is allowed and a large negative number elsewhere, (B or 1, 1, T, T).
            watch: layer whose attention is returned too.

        Returns:
            Hidden states, (B, T, D), in the type of x, and the logarithm of the watched layer's attention,
            (B, H, T, T), fp32, or None.
        """
        half = self.sizes.head_dim // 2
        frequency = self.sizes.rope_theta ** -(torch.arange(half).float() / half)
        angle = position[:, None, :, None].float() * frequency
        rotate = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        watched = None
        for index, layer in enumerate(self.layers):
            if index == watch:
                watched = layer.log_attention(x, rotate, bias)
            x = layer(x, rotate, bias)
        return rms_norm(x, self.norm, self.sizes.decoder_norm_eps), watched

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token, fp32, for hidden states (..., D)."""
        return F.linear(hidden, self.head.to(hidden.dtype)).float()

    def grow(self) -> None:
        """Insert an identity layer after every layer: twice the depth, the same function at first."""
        num_layers = 2 * len(self.layers)
        pairs = [(layer, DecoderLayer(self.sizes, num_layers, silent=True)) for layer in self.layers]
        self.layers = nn.ModuleList(layer for pair in pairs for layer in pair)

    def matrices(self) -> list[MatrixGroup]:
        """The matrices that Muon trains."""
        picked = [("qkv", 3), ("out", 1), ("gate_up", 2), ("down", 1)]
        return [MatrixGroup([getattr(layer, name) for layer in self.layers], n) for name, n in picked]


class Projector(nn.Module):
    """LLaVA's two-layer projector."""

    def __init__(self, sizes: Architecture = ARCHITECTURE) -> None:
        super().__init__()
        D = sizes.hidden_size
        self.first, self.second = Linear(D, D, D**-0.5), Linear(D, D, 0.3 * D**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map patch features (..., D) to visual tokens (..., D)."""
        return self.second(F.gelu(self.first(x)))
