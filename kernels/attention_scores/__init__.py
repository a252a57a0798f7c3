"""The parts of the attention that a reduction reads, without the (B, H, N, N) map."""

from ficoco_vllm.kernels.attention_scores.ops import (
    attention_block,
    attention_sums,
    cls_scores,
    softmax_stats,
)

__all__ = ["attention_block", "attention_sums", "cls_scores", "softmax_stats"]
