"""Where the reduction meets the fused ops: the one place that knows both."""

from ficoco_vllm.scoring.logits import LogitMap, mean_logits
from ficoco_vllm.scoring.ops import FusedOps

__all__ = ["FusedOps", "LogitMap", "mean_logits"]
