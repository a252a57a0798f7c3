"""Partition of the tokens into those that leave and those that stay."""

from ficoco_vllm.kernels.partition.ops import partition

__all__ = ["partition"]
