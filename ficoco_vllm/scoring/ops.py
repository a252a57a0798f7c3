"""The heavy steps of a reduction by the fused ops."""

from dataclasses import dataclass

from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend


@dataclass(frozen=True)
class FusedOps:
    """`ficoco_vllm.reduction.ops.Ops` by the ops of `ficoco_vllm.kernels`.

    Attributes:
        backend: which implementation of them runs.
    """

    backend: Backend = "auto"

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
        return kernels.filter_scores(
            drawn,
            task,
            weight,
            position=position,
            grid=grid,
            window=window,
            coefficient=coefficient,
            backend=self.backend,
        )

    def partition(self, redundancy: Tensor, num_removed: int) -> tuple[Tensor, Tensor]:
        """See `Ops.partition`."""
        return kernels.partition(redundancy, num_removed, backend=self.backend)

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
        return kernels.quantile_merge(
            tokens,
            size,
            correlation,
            source,
            target,
            epsilon=epsilon,
            fixed_k=fixed_k,
            average=average,
            backend=self.backend,
        )
