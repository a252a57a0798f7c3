"""Sizes of the demo model, shared by training, export and tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ficoco_vllm.benchmarks.questions.scene import IMAGE_SIZE, PATCH_SIZE


@dataclass(frozen=True)
class Architecture:
    """Sizes of the tower, the projector and the decoder.

    Both halves have heads of 32, the smallest that vLLM's CPU attention accepts.
    """

    image_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE
    hidden_size: int = 128
    num_heads: int = 4
    vision_layers: int = 8
    vision_mlp: int = 512
    decoder_layers: int = 8
    decoder_mlp: int = 384
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    vision_norm_eps: float = 1e-5
    decoder_norm_eps: float = 1e-5

    @property
    def grid(self) -> int:
        """Patches along one side of a full image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Visual tokens of a full image, [CLS] not counted."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads


ARCHITECTURE = Architecture()

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention as plain batched products.

    On a CPU the bf16 backward of the fused operator is six times slower than these three calls at the
    lengths trained here (46 to 700 tokens).

    Args:
        query: (B, H, T, d), bf16 or fp32.
        key: (B, H, T, d).
        value: (B, H, T, d).
        bias: added to the logits, broadcastable to (B, H, T, T), or None.

    Returns:
        (B, T, H * d), heads merged.

    Source: Vaswani et al., arXiv:1706.03762, Eq. 1.
    """
    B, H, T, d = query.shape
    logits = (query * d**-0.5) @ key.mT
    if bias is not None:
        logits = logits + bias
    mixed = torch.softmax(logits, dim=-1) @ value
    return mixed.transpose(1, 2).reshape(B, T, H * d)
