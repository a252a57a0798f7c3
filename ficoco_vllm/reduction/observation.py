"""Record of one reduction for tracing: the removed tokens and the destinations of their information."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ficoco_vllm.reduction.signals import Partition


@dataclass(frozen=True)
class Observation:
    """Record of one reduction. It holds references to the tensors of the reduction; weights are computed on demand.

    Attributes:
        partition: which of the N tokens left and which stayed.
        size: (B, N) fp32, patches that each token represented before.
        correlation: (B, R, K) fp32.
        new_size: (B, K + E) fp32, patches that each token represents after the reduction.
        position: (B, K + E) int64 index in the grid of each token after the reduction, -1 for a fused one.
        compress: the compression that ran, with its settings, in torch: tokens, size, partition and correlation to
            tokens and size.
    """

    partition: Partition
    size: Tensor
    correlation: Tensor
    new_size: Tensor
    position: Tensor
    compress: Callable[[Tensor, Tensor, Partition, Tensor], tuple[Tensor, Tensor]]

    def weights(self, index: int) -> Tensor:
        """The weight of every input token in every output token.

        A compression is linear in the tokens, so applied to the unit vectors it returns its weights. This holds for
        every method, with the scores that served the request.

        Args:
            index: index of the image in the batch.

        Returns:
            (K + E, N) fp32; times the tokens (N, D) it gives the reduced tokens.

        Source: arXiv:2411.17686, Eqs. 9, 10, 13.
        """
        one = slice(index, index + 1)
        unit = torch.eye(self.size.shape[1], dtype=torch.float32, device=self.size.device)[None]
        parts = Partition(self.partition.source[one], self.partition.target[one])
        mixed, _ = self.compress(unit, self.size[one], parts, self.correlation[one])
        return mixed[0]

    def shares(self, index: int) -> Tensor:
        """The share of every token that left in every token that stayed.

        Args:
            index: index of the image in the batch.

        Returns:
            (R, K + E) fp32, the part of source i that token j took: a row sums to one, or to zero where the
            source is dropped. For Eq. 13 it is alpha_ij.

        Source: arXiv:2411.17686, Eq. 13, second line.
        """
        weights = self.weights(index)
        target = self.partition.target[index]
        # A token that stayed went into itself with weight one before the division; a fused token has no self.
        own = weights.new_ones(weights.shape[0])
        own[: target.shape[0]] = weights[torch.arange(target.shape[0], device=weights.device), target]
        alpha = (weights[:, self.partition.source[index]] / torch.where(own != 0, own, 1.0)[:, None]).abs().T
        total = alpha.sum(dim=1, keepdim=True)
        return alpha / torch.where(total > 0, total, 1.0)


Observer = Callable[[Observation], None]
