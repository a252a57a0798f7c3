"""Redundancy scores out of attention sums, with the local penalty."""

from ficoco_vllm.kernels.filter_scores.ops import filter_scores

__all__ = ["filter_scores"]
