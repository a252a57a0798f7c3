"""Qwen3-VL's position embeddings without a GPU: in torch, not in Triton's interpreter."""

from vllm.model_executor.models import qwen3_vl
from vllm.platforms import current_platform

from ficoco_vllm.hooks.wrapping import replace


def hook_position_embeddings() -> None:
    """Let the tower interpolate its position embeddings in torch on a CPU. Idempotent.

    vLLM uses the kernel wherever it finds Triton, which includes methods of the decoder on a CPU. Interpreted, it
    takes longer than the rest of the tower.
    """
    if current_platform.is_cpu():
        replace(qwen3_vl, "HAS_TRITON", False)
