"""Compact CLIP tower with Hugging Face's mathematics and weights, several times as fast on a CPU."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.demo_model.architecture import ARCHITECTURE, Architecture, attend
from tools.demo_model.muon import MatrixGroup


def sincos_positions(dim: int, grid: int, base: float = 100.0) -> Tensor:
    """Two-dimensional sine and cosine positions, (grid * grid, dim), fp32."""
    frequency = 1 / base ** (torch.arange(dim // 4) / (dim // 4))
    y, x = torch.meshgrid(torch.arange(grid).float(), torch.arange(grid).float(), indexing="ij")
    axes = [axis.reshape(-1, 1) * frequency for axis in (y, x)]
    return torch.cat([wave(axis) for axis in axes for wave in (torch.sin, torch.cos)], dim=1)


class Norm(nn.Module):
    """Layer normalisation with its weights cast to the type of the input."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of (..., D)."""
        return F.layer_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Linear(nn.Module):
    """A linear map kept in fp32 and used in the type of its input."""

    def __init__(self, num_in: int, num_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_out, num_in) * std)
        self.bias = nn.Parameter(torch.zeros(num_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., num_in) to (..., num_out)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Layer(nn.Module):
    """One pre-norm encoder layer with query, key and value in one matrix."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        D, H, depth = sizes.hidden_size, sizes.vision_mlp, 2 * sizes.vision_layers
        self.num_heads = sizes.num_heads
        self.norm1, self.norm2 = Norm(D, sizes.vision_norm_eps), Norm(D, sizes.vision_norm_eps)
        self.qkv, self.out = Linear(D, 3 * D, D**-0.5), Linear(D, D, (D * depth) ** -0.5)
        self.up, self.down = Linear(D, H, D**-0.5), Linear(H, D, (H * depth) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        B, T, _ = x.shape
        qkv = self.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(attend(qkv[0], qkv[1], qkv[2]))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTower(nn.Module):
    """CLIP's vision transformer; any window of the full grid may be given.

    Positions begin as two-dimensional waves, so a tower trained on small windows at random places of the
    grid needs no interpolation to read the full image.
    """

    def __init__(self, sizes: Architecture = ARCHITECTURE) -> None:
        super().__init__()
        D = sizes.hidden_size
        self.patch = nn.Parameter(
            torch.randn(D, 3 * sizes.patch_size**2) / math.sqrt(3 * sizes.patch_size**2)
        )
        self.class_embedding = nn.Parameter(torch.randn(D) * 0.02)
        positions = torch.cat([torch.zeros(1, D), 0.5 * sincos_positions(D, sizes.grid)])
        self.position = nn.Parameter(positions)
        self.pre_norm, self.post_norm = Norm(D, sizes.vision_norm_eps), Norm(D, sizes.vision_norm_eps)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.vision_layers))

    def forward(self, patches: Tensor, position: Tensor, num_layers: int | None = None) -> list[Tensor]:
        """Hidden states as Hugging Face numbers them.

        Args:
            patches: normalised pixels, (B, N, 3 * P * P), channel first, bf16 or fp32.
            position: index of each patch in the full grid, (B, N), int64.
            num_layers: number of layers to run; None runs all.

        Returns:
            num_layers + 1 tensors (B, 1 + N, D): entry k is the output of layer k, [CLS] first.

        Source: Radford et al., arXiv:2103.00020; ViT, arXiv:2010.11929, Eqs. 1-4.
        """
        table = self.position.to(patches.dtype)
        x = F.linear(patches, self.patch.to(patches.dtype)) + table[1:][position]
        cls = (self.class_embedding.to(x.dtype) + table[0]).expand(len(x), 1, -1)
        states = [self.pre_norm(torch.cat([cls, x], dim=1))]
        for layer in list(self.layers)[:num_layers]:
            states.append(layer(states[-1]))
        return states

    def matrices(self) -> list[MatrixGroup]:
        """The matrices that Muon trains."""
        picked = [("qkv", 3), ("out", 1), ("up", 1), ("down", 1)]
        return [MatrixGroup([getattr(layer, name).weight for layer in self.layers], n) for name, n in picked]


class VisionHeads(nn.Module):
    """Linear heads on patches and [CLS] that train the tower.

    Patches are read at the decoder's feature layer, `hidden_states[-2]`, and two layers earlier. [CLS] is read from the
    middle layers on, so that its attention there already selects relevant patches.
    """

    def __init__(self, sizes: Architecture, num_patch_classes: int, num_image_classes: int) -> None:
        super().__init__()
        D, last = sizes.hidden_size, sizes.vision_layers
        self.patch_layers = (last - 3, last - 1)
        self.cls_layers = tuple(range(last // 2, last + 1))
        self.patch = nn.ModuleList(Linear(D, num_patch_classes, 0.02) for _ in self.patch_layers)
        self.cls_norm = nn.ModuleList(Norm(D, sizes.vision_norm_eps) for _ in self.cls_layers[:-1])
        self.cls = nn.ModuleList(Linear(D, num_image_classes, 0.02) for _ in self.cls_layers)

    def forward(self, states: list[Tensor], tower: VisionTower) -> tuple[list[Tensor], list[Tensor]]:
        """Read the patches and [CLS].

        Args:
            states: output of VisionTower, all layers.
            tower: for the norm that CLIP puts after its last layer.

        Returns:
            Patch logits (B, N, classes) of each read layer, the decoder's layer last, and [CLS] logits
            (B, classes) of each read layer, all fp32.
        """
        patches = [
            head(states[layer][:, 1:]).float()
            for head, layer in zip(self.patch, self.patch_layers, strict=True)
        ]
        norms = [*self.cls_norm, tower.post_norm]
        cls = [
            head(norm(states[layer][:, 0])).float()
            for head, norm, layer in zip(self.cls, norms, self.cls_layers, strict=True)
        ]
        return patches, cls
