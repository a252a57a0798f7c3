"""The heavy steps of a reduction, exchangeable: what the methods call, and the torch implementation of it.

The core knows no kernels. Whoever runs it on a device that has some hands its own `Ops` to the reducer.
"""

from typing import Protocol

from torch import Tensor

from ficoco_vllm.kernels.filter_scores import eager as filter_scores
from ficoco_vllm.kernels.partition import eager as partition
from ficoco_vllm.kernels.quantile_merge import eager as quantile_merge


class Ops(Protocol):
    """An implementation of the heavy steps, with shapes known beforehand and no look at data on the host."""

    def filter_scores(
        self,
        drawn: Tensor | None,
        task: Tensor | None,
        weight: float,
        position: Tensor,
        grid: tuple[int, int],
        window: tuple[int, int] | None,
        coefficient: float,
    ) -> Tensor:
        """s_i = weight / N * drawn_i - (1 - weight) * task_i, then the local penalty.

        Args:
            drawn: (B, N) fp64 row sums, or None.
            task: (B, N) fp32, or None.
            weight: 0 to 1.
            position: (B, N) int64, -1 for a token that has no place in the grid.
            grid: rows and columns of the original grid.
            window: of the local penalty; None leaves it out.
            coefficient: what the first highest score of a window is multiplied by where positive and divided by
                where negative; at least 1.

        Returns:
            (B, N) fp64 redundancy.

        Source: arXiv:2411.17686, Eqs. 11 and 14; Alg. 1, line 3.
        """

    def partition(self, redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
        """Sources (B, R) and targets (B, K) of redundancies (B, N), fp32 or fp64; see `signals.partition`."""

    def quantile_merge(
        self,
        tokens: Tensor,
        size: Tensor,
        correlation: Tensor,
        source: Tensor,
        target: Tensor,
        epsilon: float,
        fixed_k: int | None,
        average: bool,
    ) -> tuple[Tensor, Tensor]:
        """Tokens (B, K, D) and sizes (B, K) after the merge; see `stages.compress.quantile_merge`."""


class TorchOps:
    """The steps in torch, on any device."""

    def filter_scores(
        self,
        drawn: Tensor | None,
        task: Tensor | None,
        weight: float,
        position: Tensor,
        grid: tuple[int, int],
        window: tuple[int, int] | None,
        coefficient: float,
    ) -> Tensor:
        """See `Ops.filter_scores`."""
        return filter_scores.filter_scores(
            drawn, task, weight, position, grid, window, coefficient, None, None
        )

    def partition(self, redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
        """See `Ops.partition`."""
        return partition.partition(redundancy, num_removed, redundancy.shape[1] - num_removed, None, None)

    def quantile_merge(
        self,
        tokens: Tensor,
        size: Tensor,
        correlation: Tensor,
        source: Tensor,
        target: Tensor,
        epsilon: float,
        fixed_k: int | None,
        average: bool,
    ) -> tuple[Tensor, Tensor]:
        """See `Ops.quantile_merge`."""
        return quantile_merge.quantile_merge(
            tokens, size, correlation, source, target, "cut", epsilon, fixed_k, average, False
        )


TORCH: Ops = TorchOps()
