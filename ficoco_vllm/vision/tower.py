"""A vision tower run with fewer tokens from layer to layer, on the modules and weights of vLLM or transformers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ficoco_vllm.metrics.stopwatch import Lap
from ficoco_vllm.planning.tiling import Crop
from ficoco_vllm.planning.tower import VisionPlan
from ficoco_vllm.reduction import Observer, Signals
from ficoco_vllm.vision.attention import ClipHeads, attention_with_lse
from ficoco_vllm.vision.cpu_attention import HeadSums, centred_attention, centred_keys, is_faster
from ficoco_vllm.vision.units import UnitHeads

# Relevance (B, N) fp32 for the questions about B images, of units (B, N, unit * D) after the tower.
ToQuestion = Callable[[Tensor], Tensor]
# Returns the observer of the reduction at a site and a layer index, or None.
Observers = Callable[[str, int], Observer | None]


class EncoderLayer(Protocol):
    """One layer of a tower, in the parts between which tokens are reduced."""

    @property
    def scale(self) -> float:
        """Factor of the attention's logits."""

    @property
    def num_heads(self) -> int:
        """Attention heads of the whole model."""

    @property
    def all_reduce(self) -> Callable[[Tensor], Tensor] | None:
        """Sum over the ranks, under tensor parallelism; else None."""

    def whole(self, hidden: Tensor) -> Tensor:
        """The layer without a reduction, (B, N, D) to (B, N, D)."""

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, (B, H, N, d) each, of the normalised input (B, N, D)."""

    def project(self, mixed: Tensor) -> Tensor:
        """Output of the attention, (B, N, D), from the heads' outputs side by side, (B, N, H * d)."""

    def mlp(self, hidden: Tensor) -> Tensor:
        """MLP of the normalised input, (B, N, D) to (B, N, D), without the residual."""


class Tower(ABC):
    """A vision tower up to the layer that its model reads. The defaults are those of a CLIP.

    Attributes:
        layers: those that run.
        has_cls: whether the first token is a [CLS].
        unit: patches of a unit, see `TowerShape`.
    """

    layers: Sequence[EncoderLayer]
    has_cls: bool = True
    unit: int = 1

    @abstractmethod
    def embed(self, pixels: Tensor) -> Tensor:
        """Input of the first layer.

        Args:
            pixels: (B, 3, height, width), or what a family's processor returns for B images of one grid.

        Returns:
            (B, C + U * unit, D): [CLS] first where there is one (C = 1), then unit after unit in raster order; a unit's
            patches in the order in which the module after the tower joins them.
        """

    def layers_at(self, position: Tensor) -> Sequence[EncoderLayer]:
        """The layers, for units at these places; a tower that rotates queries and keys by place needs them.

        Args:
            position: (B, U) int64 index in the grid, -1 for a fused unit.
        """
        return self.layers

    def finish(self, hidden: Tensor) -> Tensor:
        """Operations after the last layer, on each token alone: (B, N, D) to (B, N, D)."""
        return hidden


@dataclass(frozen=True)
class Tokens:
    """Tokens between two layers of the tower.

    Attributes:
        hidden: (B, C + U * unit, D), see `Tower.embed`.
        size: (B, U) fp32 units that each unit represents.
        position: (B, U) int64 index in the grid, -1 for a fused unit.
    """

    hidden: Tensor
    size: Tensor
    position: Tensor

    def split(self, unit: int) -> tuple[Tensor, Tensor]:
        """[CLS] and units.

        Args:
            unit: patches of a unit.

        Returns:
            (B, C, D), and (B, U, unit * D): the patches of a unit side by side.
        """
        B, U = self.size.shape
        num_cls = self.hidden.shape[1] - U * unit
        return self.hidden[:, :num_cls], self.hidden[:, num_cls:].reshape(B, U, -1)


def encode(
    tower: Tower,
    pixels: Tensor,
    plan: VisionPlan,
    grid: tuple[int, int],
    lap: Lap | None = None,
    observers: Observers | None = None,
    crop: Crop | None = None,
    relevance: ToQuestion | None = None,
) -> Tokens:
    """Features of images that all follow one plan.

    Whole units leave: a unit's patches stay or leave together, and a patch is merged with the patch in the same place
    of another unit.

    Args:
        tower: that runs.
        pixels: pixels of B images, see `Tower.embed`.
        plan: which layer removes how many units, and how.
        grid: rows and columns of units.
        lap: times the reductions.
        observers: the observer of each reduction, for requests that are traced.
        crop: of tiles with padding, the units that show the image. The others are dropped before the first layer whose
            attention the method reads; from there on the crop is the whole grid.
        relevance: for the questions about the images, where the method reads it.

    Returns:
        The kept tokens: `hidden` (B, C + keep * unit, D) in the tower's dtype, units in raster order, `position` in the
        grid or the crop.

    Source: arXiv:2411.17686, Alg. 1.
    """
    tokens = _embedded(tower, pixels)
    N = tokens.size.shape[1]
    layers = tower.layers_at(tokens.position)
    last = len(layers) - 1
    measured = [layer for layer, count in plan.removals.items() if count]
    measured += [] if plan.shallow_layer is None else [plan.shallow_layer]
    first = min(measured, default=last)
    shallow = None
    for index in range(len(layers)):
        if crop is not None and index == first:
            tokens, grid = _without_padding(tokens, grid, crop, tower.unit), (crop.rows, crop.columns)
            N = crop.num_units
            layers = tower.layers_at(tokens.position)
        layer = layers[index]
        num_removed = plan.removals.get(index, 0)
        on_features = index == last and not plan.removals
        weighted = plan.proportional and tokens.size.shape[1] < N
        if not (num_removed or on_features or weighted or index == plan.shallow_layer):
            tokens = replace(tokens, hidden=layer.whole(tokens.hidden))
            continue
        tokens, attention = _attend(tower, layer, tokens, weighted, plan)
        if index == plan.shallow_layer:
            shallow = attention.cls_attention()
        if num_removed:
            observer = observers and observers("encoder", index)
            with _timed(lap):
                tokens = _reduce(tokens, attention, plan, num_removed, grid, observer, tower.unit)
            layers = tower.layers_at(tokens.position)
        tokens = replace(tokens, hidden=tokens.hidden + layer.mlp(tokens.hidden))
        if on_features and plan.keep < N:
            tokens = replace(tokens, hidden=tower.finish(tokens.hidden))
            num_removed, observer = (
                N - plan.keep + plan.reducer.num_extra,
                observers and observers("features", index),
            )
            with _timed(lap):
                return _reduce(
                    tokens, attention, plan, num_removed, grid, observer, tower.unit, shallow, relevance
                )
    return replace(tokens, hidden=tower.finish(tokens.hidden))


def run_whole(tower: Tower, pixels: Tensor) -> Tokens:
    """Features of images, or tiles, from which nothing leaves.

    Args:
        tower: that runs.
        pixels: pixels of B images, see `Tower.embed`.
    """
    tokens = _embedded(tower, pixels)
    hidden = tokens.hidden
    for layer in tower.layers_at(tokens.position):
        hidden = layer.whole(hidden)
    return replace(tokens, hidden=tower.finish(hidden))


def _embedded(tower: Tower, pixels: Tensor) -> Tokens:
    hidden = tower.embed(pixels)
    B, U = hidden.shape[0], (hidden.shape[1] - tower.has_cls) // tower.unit
    position = torch.arange(U, device=hidden.device).expand(B, U)
    return Tokens(hidden, hidden.new_ones((B, U), dtype=torch.float32), position)


def cropped(units: Tensor, grid: tuple[int, int], crop: Crop) -> Tensor:
    """The units of tiles that show the image.

    Args:
        units: (B, N, D) of the whole grid, in raster order.
        grid: rows and columns.
        crop: which of them.

    Returns:
        (B, rows * columns of the crop, D).
    """
    B, _, D = units.shape
    rows = slice(crop.top, crop.top + crop.rows)
    columns = slice(crop.left, crop.left + crop.columns)
    return units.view(B, *grid, D)[:, rows, columns].reshape(B, -1, D)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Context in which tokens keep their dtype: under autocast, products of float32 are not float32."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def _without_padding(tokens: Tokens, grid: tuple[int, int], crop: Crop, unit: int) -> Tokens:
    """Tokens of tiles before any reduction, without those that show padding."""
    B, _, D = tokens.hidden.shape
    cls, units = tokens.split(unit)
    shown = cropped(units, grid, crop)
    position = torch.arange(crop.num_units, device=shown.device).expand(B, -1)
    hidden = torch.cat([cls, shown.reshape(B, -1, D)], dim=1)
    return Tokens(hidden, tokens.size.new_ones(position.shape), position)


def _timed(lap: Lap | None) -> AbstractContextManager[None]:
    return nullcontext() if lap is None else lap.running()


def _attend(
    tower: Tower, layer: EncoderLayer, tokens: Tokens, weighted: bool, plan: VisionPlan
) -> tuple[Tokens, ClipHeads | UnitHeads]:
    """The first half of an encoder layer, and its queries and keys for measuring attention."""
    query, key, value = layer.heads(tokens.hidden)
    B, _, N, _ = query.shape
    bias = None
    if weighted:  # [CLS] has size one
        log_size = tokens.size.log()
        if tower.unit > 1:
            log_size = log_size.repeat_interleave(tower.unit, dim=1)
        bias = torch.cat([log_size.new_zeros((B, int(tower.has_cls))), log_size], dim=1).to(query.dtype)
    sums = lse = None
    if not (weighted or plan.logits) and is_faster(query):
        # The parts of the map that methods read are a by-product here; a fused kernel returns its normalisers instead.
        zeros = query.new_zeros((2, B, N), dtype=torch.float32)
        keys = centred_keys(key, layer.scale)
        sums = HeadSums(keys, first=zeros) if tower.has_cls else HeadSums(keys, received=zeros[0])
        mixed = centred_attention(query, keys, value, sums)
    else:
        output, lse = attention_with_lse(query, key, value, layer.scale, bias)
        mixed = output.transpose(1, 2)
    projected = layer.project(mixed.reshape(B, N, -1))
    heads = ClipHeads(
        query,
        key,
        lse,
        layer.scale,
        bias,
        layer.num_heads,
        layer.all_reduce,
        plan.reducer.signals,
        plan.logits,
        plan.backend,
        has_cls=tower.has_cls,
        given_sums=sums,
    )
    measured = heads if tower.unit == 1 else UnitHeads(heads, tower.unit)
    return replace(tokens, hidden=tokens.hidden + projected), measured


def _reduce(
    tokens: Tokens,
    attention: ClipHeads | UnitHeads,
    plan: VisionPlan,
    num_removed: int,
    grid: tuple[int, int],
    observer: Observer | None,
    unit: int,
    shallow: Tensor | None = None,
    relevance: ToQuestion | None = None,
) -> Tokens:
    """One reduction of the units; [CLS] stays first. `shallow` is the [CLS] attention of a shallow layer."""
    needed = plan.reducer.signals
    cls, units = tokens.split(unit)
    with without_autocast(units.device):
        signals = Signals(
            visual_attention=attention.visual_attention() if "visual_attention" in needed else None,
            cls_attention=attention.cls_attention() if "cls_attention" in needed else None,
            shallow_cls_attention=shallow,
            keys=attention.keys() if "keys" in needed else None,
            text_relevance=relevance(units) if relevance is not None else None,
            position=tokens.position,
            grid=grid,
        )
        # Compressions are linear in the tokens, so units side by side are merged place by place.
        reduced = plan.reducer(units, signals, num_removed, tokens.size, plan.backend, observer)
    B, _, D = tokens.hidden.shape
    hidden = torch.cat([cls, reduced.tokens.reshape(B, -1, D)], dim=1)
    return Tokens(hidden, reduced.size, reduced.position)
