"""vLLM's positions of pruned tokens, for images: vLLM recomputes positions only where it prunes videos."""

from typing import Any

from ficoco_vllm.hooks.wrapping import wrap


def hook_pruned_positions(multimodal_config: Any) -> None:
    """Make vLLM recompute positions after the tower, as for its own pruning of videos. Idempotent.

    Args:
        multimodal_config: vLLM's `MultiModalConfig` of one engine.
    """
    wrap(multimodal_config, "is_multimodal_pruning_enabled", _prunes)


def _prunes(original: Any) -> bool:
    return True
