"""A CLIP tower run with fewer tokens from layer to layer, on the modules and weights of vLLM or transformers."""

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


class Tower(Protocol):
    """A CLIP tower up to the layer that LLaVA reads."""

    @property
    def layers(self) -> Sequence[EncoderLayer]:
        """The layers that run."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Input of the first layer, [CLS] first: (B, 3, height, width) to (B, 1 + N, D)."""


@dataclass(frozen=True)
class Tokens:
    """Tokens between two layers of the tower.

    Attributes:
        hidden: (B, 1 + N, D), [CLS] first.
        size: (B, N) fp32 patches that each token represents.
        position: (B, N) int64 index in the grid, -1 for a fused token.
    """

    hidden: Tensor
    size: Tensor
    position: Tensor


def encode(
    tower: Tower,
    pixels: Tensor,
    plan: VisionPlan,
    grid: tuple[int, int],
    lap: Lap | None = None,
    observers: Observers | None = None,
    crop: Crop | None = None,
) -> Tokens:
    """Features of images that all follow one plan.

    Args:
        tower: that runs.
        pixels: (B, 3, height, width).
        plan: which layer removes how many tokens, and how.
        grid: rows and columns of patches.
        lap: times the reductions.
        observers: the observer of each reduction, for requests that are traced.
        crop: of tiles with padding, the patches that show the image. The others are dropped before the first layer
            whose attention the method reads; from there on the crop is the whole grid.

    Returns:
        The kept tokens: `hidden` (B, 1 + keep, D) in the tower's dtype, patch tokens in raster order, `position` in
        the grid or the crop.

    Source: arXiv:2411.17686, Alg. 1.
    """
    hidden = tower.embed(pixels)
    B, N = hidden.shape[0], hidden.shape[1] - 1
    position = torch.arange(N, device=hidden.device).expand(B, N)
    tokens = Tokens(hidden, hidden.new_ones((B, N), dtype=torch.float32), position)
    last = len(tower.layers) - 1
    measured = [layer for layer, count in plan.removals.items() if count]
    measured += [] if plan.shallow_layer is None else [plan.shallow_layer]
    first = min(measured, default=last)
    shallow = None
    for index, layer in enumerate(tower.layers):
        if crop is not None and index == first:
            tokens, grid = _without_padding(tokens, grid, crop), (crop.rows, crop.columns)
            N = crop.num_patches
        num_removed = plan.removals.get(index, 0)
        on_features = index == last and not plan.removals
        weighted = plan.proportional and tokens.size.shape[1] < N
        if not (num_removed or on_features or weighted or index == plan.shallow_layer):
            tokens = replace(tokens, hidden=layer.whole(tokens.hidden))
            continue
        tokens, attention = _attend(layer, tokens, weighted, plan)
        if index == plan.shallow_layer:
            shallow = attention.cls_attention()
        if num_removed:
            observer = observers and observers("encoder", index)
            with _timed(lap):
                tokens = _reduce(tokens, attention, plan, num_removed, grid, observer)
        tokens = replace(tokens, hidden=tokens.hidden + layer.mlp(tokens.hidden))
        if on_features and plan.keep < N:
            num_removed, observer = (
                N - plan.keep + plan.reducer.num_extra,
                observers and observers("features", index),
            )
            with _timed(lap):
                tokens = _reduce(tokens, attention, plan, num_removed, grid, observer, shallow)
    return tokens


def cropped(patches: Tensor, grid: tuple[int, int], crop: Crop) -> Tensor:
    """The patches of tiles that show the image.

    Args:
        patches: (B, N, D) of the whole grid, in raster order.
        grid: rows and columns.
        crop: which of them.

    Returns:
        (B, rows * columns of the crop, D).
    """
    B, _, D = patches.shape
    rows = slice(crop.top, crop.top + crop.rows)
    columns = slice(crop.left, crop.left + crop.columns)
    return patches.view(B, *grid, D)[:, rows, columns].reshape(B, -1, D)


def _without_padding(tokens: Tokens, grid: tuple[int, int], crop: Crop) -> Tokens:
    """Tokens of tiles before any reduction, without those that show padding."""
    B = tokens.hidden.shape[0]
    patches = cropped(tokens.hidden[:, 1:], grid, crop)
    position = torch.arange(crop.num_patches, device=patches.device).expand(B, -1)
    hidden = torch.cat([tokens.hidden[:, :1], patches], dim=1)
    return Tokens(hidden, tokens.size.new_ones(position.shape), position)


def _timed(lap: Lap | None) -> AbstractContextManager[None]:
    return nullcontext() if lap is None else lap.running()


def _attend(
    layer: EncoderLayer, tokens: Tokens, weighted: bool, plan: VisionPlan
) -> tuple[Tokens, ClipHeads]:
    """The first half of an encoder layer, and its queries and keys for measuring attention."""
    query, key, value = layer.heads(tokens.hidden)
    B, _, N, _ = query.shape
    bias = None
    if weighted:  # [CLS] has size one
        bias = torch.cat([tokens.size.new_zeros((B, 1)), tokens.size.log()], dim=1).to(query.dtype)
    output, lse = attention_with_lse(query, key, value, layer.scale, bias)
    projected = layer.project(output.transpose(1, 2).reshape(B, N, -1))
    attention = ClipHeads(
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
    )
    return replace(tokens, hidden=tokens.hidden + projected), attention


def _reduce(
    tokens: Tokens,
    attention: ClipHeads,
    plan: VisionPlan,
    num_removed: int,
    grid: tuple[int, int],
    observer: Observer | None,
    shallow: Tensor | None = None,
) -> Tokens:
    """One reduction of the patch tokens; [CLS] stays first. `shallow` is the [CLS] attention of a shallow layer."""
    needed = plan.reducer.signals
    signals = Signals(
        visual_attention=attention.visual_attention() if "visual_attention" in needed else None,
        cls_attention=attention.cls_attention() if "cls_attention" in needed else None,
        shallow_cls_attention=shallow,
        keys=attention.keys() if "keys" in needed else None,
        position=tokens.position,
        grid=grid,
    )
    cls, patches = tokens.hidden[:, :1], tokens.hidden[:, 1:]
    reduced = plan.reducer(patches, signals, num_removed, tokens.size, plan.backend, observer)
    return Tokens(torch.cat([cls, reduced.tokens], dim=1), reduced.size, reduced.position)
