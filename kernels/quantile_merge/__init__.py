"""Merges the tokens that leave into those that stay, above a quantile of their correlations."""

from ficoco_vllm.kernels.quantile_merge.eager import row_quantile, weighted_mean
from ficoco_vllm.kernels.quantile_merge.ops import quantile_merge

__all__ = ["quantile_merge", "row_quantile", "weighted_mean"]
