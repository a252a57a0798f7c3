"""The kept tokens of an image's tiles, in the order in which the language model reads them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ficoco_vllm.planning.tiles import Layout
from ficoco_vllm.vision.staging import to_device


class Kept(NamedTuple):
    """Kept tokens of a tile.

    Attributes:
        tokens: (K, D) projected.
        position: (K,) int64 index in the tile's crop, ascending; -1 for a fused token, after the others.
    """

    tokens: Tensor
    position: Tensor


def pack(layout: Layout, kept: Sequence[Kept], newline: Tensor | None, side: int) -> Tensor:
    """Join the tokens of an image's tiles.

    Where rows do not end in newlines, one tile follows the other. In LLaVA-NeXT the base view comes first, in raster
    order. Then come the rows of tiles from above. Within a row of tiles the tokens are ordered as their patches are in
    the image, line by line across the tiles, as in stock vLLM; fused tokens, which have no place, follow, then one
    newline.

    Args:
        layout: layout of the image.
        kept: kept tokens of each of its tiles.
        newline: (D,) embedding of the end of a row; None where the model has none.
        side: rows and columns of patches of a tile.

    Returns:
        (num_tokens of the layout, D).

    Deviation: stock LLaVA-NeXT has a newline after each row of patches. The number of rows that keep a token depends on
    the pixels, while the prompt is sized before any pixel is read.
    """
    if not layout.ends_rows:
        return torch.cat([tokens for tokens, _ in kept])
    assert newline is not None
    rows = layout.newline_rows
    # A place in the image as one number: line of patches, then column; two more columns for tokens without a place.
    width = side * (1 + max((tile.place.column for tile in layout.tiles), default=0)) + 2
    pieces, keys = (
        [newline.expand(len(rows), -1)],
        [to_device([(row + 1) * side * width - 1 for row in rows], newline.device)],
    )
    base: list[Tensor] = []
    for tile, (tokens, position) in zip(layout.tiles, kept, strict=True):
        place, crop = tile.place, tile.place.crop
        if place.row < 0:
            base.append(tokens)
            continue
        line = place.row * side + crop.top + position // crop.columns
        column = place.column * side + crop.left + position % crop.columns
        last = (place.row + 1) * side * width - 2
        keys.append(torch.where(position < 0, last, line * width + column))
        pieces.append(tokens)
    order = torch.cat(keys).argsort(stable=True)
    return torch.cat([*base, torch.cat(pieces)[order]])
