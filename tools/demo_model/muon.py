"""Muon: momentum whose update is made orthogonal, for the matrices inside the layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push all singular values towards one with Newton-Schulz steps.

    Args:
        matrices: (n, rows, columns), fp32.
        steps: Newton-Schulz steps.

    Returns:
        The same shape, bf16: the steps tolerate the rounding and run several times as fast.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = COEFFICIENTS
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices of one shape, stepped together.

    Attributes:
        params: the matrices, (rows, columns) each.
        parts: number of matrices stacked in the rows of each (3 for query, key and value).
    """

    params: Sequence[nn.Parameter]
    parts: int


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, batched over layers.

    Args:
        groups: matrices that share a shape.
        lr: learning rate, scaled by sqrt(rows / columns) for tall matrices.
        momentum: share of the running gradient that stays.
    """

    def __init__(self, groups: Sequence[MatrixGroup], lr: float, momentum: float = 0.95) -> None:
        settings = [{"params": list(group.params), "parts": group.parts} for group in groups]
        super().__init__(settings, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every matrix by one orthogonal update."""
        for group in self.param_groups:
            params, parts = group["params"], group["parts"]
            grad = torch.stack([param.grad for param in params])
            state = self.state[params[0]]
            if "buffer" not in state:
                state["buffer"] = torch.zeros_like(grad)
            buffer = state["buffer"].lerp_(grad, 1 - group["momentum"])
            update = grad.lerp(buffer, group["momentum"])
            n, rows, columns = update.shape
            update = orthogonalize(update.reshape(n * parts, rows // parts, columns)).float()
            update = (update * max(1.0, rows / parts / columns) ** 0.5).reshape(n, rows, columns)
            torch._foreach_add_(list(params), list(update.unbind()), alpha=-group["lr"])
