"""Attention as the reduction looks at it, without the (B, H, N, N) map."""

from ficoco_vllm.kernels.attention_scores.mask import Mask
from ficoco_vllm.kernels.attention_scores.ops import (
    attention_block,
    attention_sums,
    cls_scores,
    softmax_stats,
)

__all__ = ["Mask", "attention_block", "attention_sums", "cls_scores", "softmax_stats"]
