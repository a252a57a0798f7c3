"""M-RoPE places of visual tokens that stay: they travel as further channels of the embeddings.

How many tokens stay is known when a prompt is sized, which ones only after the tower has run. So the positions of all
text, and the first position of each image, come from the host; the tower adds row and column of each token.
"""

import torch
from torch import Tensor

# Row and column, each as two digits, which every floating dtype represents exactly.
CHANNELS = 4
_BASE = 256


def with_places(embeddings: Tensor, unit: Tensor, columns: int) -> Tensor:
    """Append the places of visual tokens.

    Args:
        embeddings: (K, D) any floating dtype.
        unit: (K,) int64 index in the image's grid.
        columns: columns of that grid.

    Returns:
        (K, D + CHANNELS).
    """
    row, column = unit // columns, unit % columns
    digits = torch.stack([row // _BASE, row % _BASE, column // _BASE, column % _BASE], dim=1)
    return torch.cat([embeddings, digits.to(embeddings.dtype)], dim=1)


def without_places(embeddings: Tensor) -> Tensor:
    """Append channels that leave the positions of the tokens as they are.

    Args:
        embeddings: (K, D) any floating dtype.

    Returns:
        (K, D + CHANNELS).
    """
    return torch.cat([embeddings, embeddings.new_full((len(embeddings), CHANNELS), -1)], dim=1)


def put_places(positions: Tensor, index: Tensor, channels: Tensor) -> Tensor:
    """Positions of a prompt, with those of its visual tokens filled in.

    Args:
        positions: (3, N) int64 time, row and column of each token; the time of a visual token is its image's first
            position.
        index: (K,) int64 tokens of the prompt.
        channels: (K, CHANNELS) their last channels.

    Returns:
        (3, N) int64.
    """
    digits = channels.long()
    place = digits[:, ::2] * _BASE + digits[:, 1::2]
    known = (digits[:, :1] >= 0).T
    filled = positions.clone()
    filled[1:, index] = torch.where(known, positions[:1, index] + place.T, positions[1:, index])
    return filled
