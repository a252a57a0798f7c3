"""Reductions of an oracle, layer by layer, in the format of the engine's traces."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ficoco_vllm.tracing.chain import Step


@dataclass
class Spy:
    """Stands in for a reduction of an oracle and notes how it mixes its tokens.

    Attributes:
        reduce: the reduction: tokens (N, D) first; it answers the kept tokens (K, D) and something else, in any order.
        mixes: (K, N) for each call: row j says how much of each token went into token j.
    """

    reduce: Callable[..., Any]
    mixes: list[Tensor] = field(default_factory=list)

    def __call__(self, tokens: np.ndarray, *args: Any) -> Any:
        """Reduce, and once more the unit vectors."""
        result = self.reduce(np.eye(len(tokens)), *args)
        self.mixes.append(torch.from_numpy(next(part for part in result if isinstance(part, np.ndarray))))
        return self.reduce(tokens, *args)


def assert_same_story(steps: list[Step], mixes: list[Tensor], num_tokens: int, tolerance: float) -> None:
    """The trace names the same tokens as the oracle, and the same shares.

    Args:
        steps: of the engine's trace.
        mixes: of the oracle, (K, N) each.
        num_tokens: that enter the first step, named from 0.
        tolerance: of a share.
    """
    names = list(range(num_tokens))
    assert len(steps) == len(mixes)
    for step, mix in zip(steps, mixes, strict=True):
        left = [name for name in names if name not in step.kept]
        assert [departure.token for departure in step.left] == left
        own = mix[range(len(step.kept)), [names.index(name) for name in step.kept]]
        assert (own > 0).all(), "the oracle kept other tokens"
        for departure in step.left:
            alpha = mix[:, names.index(departure.token)] / own
            share = torch.zeros(len(step.kept), dtype=torch.float64)
            for name, value in departure.targets:
                share[step.kept.index(name)] = value
            torch.testing.assert_close(share, alpha, rtol=0, atol=tolerance)
        names = list(step.kept)
