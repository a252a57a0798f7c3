"""Units: their order, and their signals, which are those of their patches, pooled."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ficoco_vllm.reduction.signals import AttentionMap, via_text
from ficoco_vllm.vision.attention import ClipHeads


def by_units(patches: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Order patches unit by unit, within a unit row by row.

    Args:
        patches: (B, N, D) in raster order.
        grid: rows and columns of units.
        side: rows and columns of patches of a unit.

    Returns:
        (B, N, D).
    """
    B, N, D = patches.shape
    rows, columns = grid
    return patches.view(B, rows, side, columns, side, D).transpose(2, 3).reshape(B, N, D)


@dataclass(frozen=True)
class UnitHeads:
    """Signals of one layer whose patches belong to units, measured as if each unit were one token.

    Attention to a unit is the sum over its patches, attention of a unit the mean over its patches: the attention that a
    unit pays still sums to at most one.

    Attributes:
        heads: heads of the layer.
        unit: patches of a unit, which lie side by side.
    """

    heads: ClipHeads
    unit: int

    def visual_attention(self) -> AttentionMap:
        """Head-mean attention among the units, (B, U, U), computed on demand."""
        return UnitAttention(self.heads.visual_attention(), self.unit)

    def cls_attention(self) -> Tensor:
        """Attention of [CLS] to each unit, (B, U) fp32."""
        return _grouped(self.heads.cls_attention(), self.unit).sum(dim=2)

    def keys(self) -> Tensor:
        """Head-mean keys, mean over the patches of each unit, (B, U, d) fp32."""
        return _grouped(self.heads.keys(), self.unit).mean(dim=2)


@dataclass(frozen=True)
class UnitAttention:
    """Attention among units (`AttentionMap`): mean over the patches that attend, sum over those attended to.

    Attributes:
        patches: attention among the patches.
        unit: patches of a unit.
    """

    patches: AttentionMap
    unit: int

    @property
    def shape(self) -> torch.Size:
        """(B, U, U)."""
        B, N, _ = self.patches.shape
        return torch.Size((B, N // self.unit, N // self.unit))

    def row_sum(self) -> Tensor:
        """See `AttentionMap`."""
        return _grouped(self.patches.row_sum(), self.unit).mean(dim=2)

    def column_sum(self) -> Tensor:
        """See `AttentionMap`."""
        return _grouped(self.patches.column_sum(), self.unit).mean(dim=2)

    def block(self, source: Tensor, target: Tensor, text: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        """See `AttentionMap`."""
        direct = self._pooled(self.patches.block(self._patches_of(source), self._patches_of(target)))
        return direct if text is None else via_text(direct, text, source, target, gamma)

    def dense(self) -> Tensor:
        """See `AttentionMap`."""
        return self._pooled(self.patches.dense())

    def _patches_of(self, index: Tensor) -> Tensor:
        """Indices of the patches of units, (B, K * unit)."""
        place = torch.arange(self.unit, device=index.device)
        return (index[..., None] * self.unit + place).flatten(1)

    def _pooled(self, values: Tensor) -> Tensor:
        """(B, R * unit, K * unit) to (B, R, K)."""
        B, R, K = values.shape
        return values.view(B, R // self.unit, self.unit, K // self.unit, self.unit).sum(dim=4).mean(dim=2)


def _grouped(values: Tensor, unit: int) -> Tensor:
    """(B, U * unit, ...) to (B, U, unit, ...)."""
    B, N, *rest = values.shape
    return values.reshape(B, N // unit, unit, *rest)
