"""Merge what leaves into what stays, above a quantile of its correlations."""

from ficoco_vllm.kernels.quantile_merge.layout import Layout
from ficoco_vllm.kernels.quantile_merge.ops import quantile_merge

__all__ = ["Layout", "quantile_merge"]
