"""Greedy choice of tokens that are as far from one another as possible."""

from ficoco_vllm.kernels.farthest_points.ops import farthest_points

__all__ = ["farthest_points"]
