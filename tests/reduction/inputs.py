"""Random inputs for the reduction tests: attention that is a softmax, keys, features, and positions."""

import math

import torch
from torch import Tensor

from ficoco_vllm.reduction import Signals


def make_signals(
    B: int, N: int, seed: int = 0, M: int = 5, D: int = 16, grid: tuple[int, int] | None = None
) -> Signals:
    """All signals of B images with N of the tokens of the grid alive, well separated, in fp32."""
    generator = torch.Generator().manual_seed(seed)
    if grid is None:
        side = math.ceil(math.sqrt(N))
        grid = (side, side)
    cells = grid[0] * grid[1]
    alive = torch.stack([torch.randperm(cells, generator=generator)[:N].sort().values for _ in range(B)])
    attention = torch.softmax(2 * torch.randn(B, N + 1, N + 1, generator=generator), dim=-1)
    text = torch.softmax(2 * torch.randn(B, M, N + M, generator=generator), dim=-1)
    return Signals(
        visual_attention=attention[:, 1:, 1:].contiguous(),
        cls_attention=attention[:, 0, 1:].contiguous(),
        text_attention=text[:, :, :N].contiguous(),
        keys=torch.randn(B, N, 8, generator=generator),
        features=torch.randn(B, N, D, generator=generator),
        text_features=torch.randn(B, M, D, generator=generator),
        text_relevance=torch.randn(B, N, generator=generator),
        position=alive,
        grid=grid,
    )


def make_tokens(B: int, N: int, D: int = 16, seed: int = 1) -> Tensor:
    """Tokens (B, N, D) in fp32."""
    return torch.randn(B, N, D, generator=torch.Generator().manual_seed(seed))


def one(signals: Signals, index: int) -> Signals:
    """The signals of one image of the batch, still batched."""
    values = {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in vars(signals).items()
    }
    return Signals(**values)
