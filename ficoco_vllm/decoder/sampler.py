"""Greedy sampling on a CPU without Triton's interpreter."""

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.gpu.sample.sampler import Sampler


class GreedySampler(Sampler):
    """vLLM's sampler, with the most likely tokens computed by torch if no request of the batch samples at random.

    vLLM uses its Triton sampling kernel for greedy requests too; interpreted, it takes as long as several decoder
    layers.
    """

    def __init__(self, sampler: Sampler) -> None:
        """Share all state of a sampler that vLLM has built.

        Args:
            sampler: of vLLM's own class.
        """
        self.__dict__ = sampler.__dict__

    def _sample_random(
        self, processed_logits: Tensor, expanded_idx_mapping: Tensor, idx_mapping_np: Any, *args: Any
    ) -> tuple[Tensor, Tensor]:
        """Token ids (rows,) int64 and logits (rows, V), see vLLM's sampler for the arguments."""
        if np.any(self.sampling_states.temperature.np[idx_mapping_np] != 0.0):
            sampled: tuple[Tensor, Tensor] = super()._sample_random(
                processed_logits, expanded_idx_mapping, idx_mapping_np, *args
            )
            return sampled
        # vLLM ignores top-k and top-p of greedy requests, so it would return the same logits.
        return processed_logits.argmax(dim=-1), processed_logits
