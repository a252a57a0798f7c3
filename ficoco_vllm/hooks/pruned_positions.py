"""Positions of visual tokens that stay: vLLM recomputes them after the tower only where it prunes videos itself."""

from typing import Any

from vllm.platforms import current_platform

from ficoco_vllm.hooks.wrapping import wrap


def hook_pruned_positions(multimodal_config: Any) -> None:
    """Make vLLM recompute positions after the tower, as for its own pruning of videos. Idempotent.

    Args:
        multimodal_config: vLLM's `MultiModalConfig` of one engine.
    """
    wrap(multimodal_config, "is_multimodal_pruning_enabled", _prunes)
    if current_platform.is_cpu():
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        wrap(GPUModelRunner, "_gather_mm_embeddings", _gather_mm_embeddings)


def _prunes(original: Any) -> bool:
    return True


def _gather_mm_embeddings(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Read the configuration, which vLLM's CPU runner never does."""
    config = self.model_config.multimodal_config
    self.is_multimodal_pruning_enabled = config is not None and config.is_multimodal_pruning_enabled()
    return original(self, *args, **kwargs)
