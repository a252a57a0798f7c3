"""Which tokens leave and which stay."""

from ficoco_vllm.kernels.partition.ops import partition

__all__ = ["partition"]
