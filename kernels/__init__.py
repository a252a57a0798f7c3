"""Fused ops of the reduction: pure functions of tensors, each with a torch and a Triton implementation.

Importing this package needs neither Triton nor a GPU; Triton is imported when a kernel first runs.
"""

from ficoco_vllm.kernels.attention_scores import (
    attention_block,
    attention_sums,
    cls_scores,
    softmax_stats,
)
from ficoco_vllm.kernels.backend import Backend
from ficoco_vllm.kernels.farthest_points import farthest_points
from ficoco_vllm.kernels.filter_scores import filter_scores
from ficoco_vllm.kernels.partition import partition
from ficoco_vllm.kernels.quantile_merge import quantile_merge

__all__ = [
    "Backend",
    "attention_block",
    "attention_sums",
    "cls_scores",
    "farthest_points",
    "filter_scores",
    "partition",
    "quantile_merge",
    "softmax_stats",
]
