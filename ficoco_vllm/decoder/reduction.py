"""One reduction between attention and MLP of a segment's last layer, for all requests of a step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ficoco_vllm.decoder.attention import DecoderHeads, ImageAttention
from ficoco_vllm.decoder.boundary import Boundary, ImageGroup
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.reduction import Observer, Reducer, Signals
from ficoco_vllm.vision.staging import to_device, to_device_together


@dataclass(frozen=True)
class Rows:
    """The tokens of a step.

    Attributes:
        hidden: (rows, D) residual stream.
        origin: (rows,) int64, the row of each in the first segment; kept tokens of an image keep theirs, and with it
            their position.
        size: (rows,) fp32, the number of tokens of the first segment that each represents.
    """

    hidden: Tensor
    origin: Tensor
    size: Tensor


def reduce_rows(
    rows: Rows,
    heads: DecoderHeads,
    boundary: Boundary,
    planner: DecoderPlanner,
    grid: tuple[int, int],
    observer_of: Callable[[ImageGroup], Observer | None] | None = None,
) -> Rows:
    """Merge the visual tokens that leave at a boundary into those that stay.

    Args:
        rows: after the attention of a segment's last layer.
        heads: queries and keys of that layer.
        boundary: from this segment to the next.
        planner: provides the methods.
        grid: rows and columns of an unreduced image.
        observer_of: the observer of a group's reduction, for requests that are traced.

    Returns:
        The rows of the next segment.

    Source: arXiv:2411.17686, Alg. 2.
    """
    device = rows.hidden.device
    indices = [boundary.source, *(index for group in boundary.groups for index in (group.visual, group.kept))]
    source, *of_groups = to_device_together(indices, device)
    merged = []
    for group, visual, kept in zip(boundary.groups, of_groups[::2], of_groups[1::2], strict=True):
        observer = observer_of and observer_of(group)
        reducer = planner.reducer(group.method)
        index, tokens, size = _reduce_group(rows, heads, group, visual, reducer, grid, observer)
        source[kept] = index
        merged.append((kept, tokens, size))
    hidden, sizes = rows.hidden[source], rows.size[source]
    for kept, tokens, size in merged:
        hidden[kept], sizes[kept] = tokens, size
    return Rows(hidden, rows.origin[source], sizes)


def _reduce_group(
    rows: Rows,
    heads: DecoderHeads,
    group: ImageGroup,
    visual: Tensor,
    reducer: Reducer,
    grid: tuple[int, int],
    observer: Observer | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduce images of one shape by one method.

    Returns:
        (B, K) int64 rows that the kept tokens come from, their hidden states (B, K, D) and sizes (B, K).
    """
    N = visual.shape[1]
    signals = _measure(rows, heads, group, visual, reducer, grid)
    num_removed = N - group.kept.shape[1]
    reduced = reducer(rows.hidden[visual], signals, num_removed, rows.size[visual], heads.backend, observer)
    # `position` counts the image's tokens in this segment, so it indexes the tokens that stayed.
    return visual.gather(1, reduced.position), reduced.tokens, reduced.size


def _measure(
    rows: Rows,
    heads: DecoderHeads,
    group: ImageGroup,
    visual: Tensor,
    reducer: Reducer,
    grid: tuple[int, int],
) -> Signals:
    """The signals that a method needs."""
    needed = reducer.signals
    logits = getattr(reducer.settings, "attention", "probs") == "logits"
    images = ImageAttention(heads, group, "visual_attention" in needed, logits)
    text_features = None
    if "text_features" in needed:
        text_features = rows.hidden[to_device(group.text, visual.device)]
    B, N = visual.shape
    return Signals(
        text_attention=images.text_attention() if "text_attention" in needed else None,
        visual_attention=images.visual_attention() if "visual_attention" in needed else None,
        keys=heads.mean_key(visual) if "keys" in needed else None,
        text_features=text_features,
        position=torch.arange(N, device=visual.device).expand(B, N),
        grid=grid if grid[0] * grid[1] == N else (1, N),
    )
