"""Greedy sampling without Triton's interpreter, which stands in for a GPU on a CPU."""

from typing import Any

import numpy as np
from torch import Tensor
from vllm.v1.worker.gpu.sample.sampler import Sampler


class GreedySampler(Sampler):
    """vLLM's sampler, for a CPU: the likeliest token of each request by torch where no request draws at random.

    vLLM takes it by the Triton kernel that draws, and interpreting that costs as much as layers of the decoder.
    """

    @classmethod
    def take_over(cls, sampler: Sampler) -> "GreedySampler":
        """Make a sampler that vLLM has built one of these, with all its state.

        Args:
            sampler: of vLLM's own class.

        Raises:
            TypeError: it is of a class of its own, whose way of sampling would be lost.
        """
        if type(sampler) is not Sampler:
            raise TypeError(f"a {type(sampler).__name__} samples in its own way")
        sampler.__class__ = cls
        assert isinstance(sampler, cls)
        return sampler

    def _sample_random(
        self, processed_logits: Tensor, expanded_idx_mapping: Tensor, idx_mapping_np: Any, *args: Any
    ) -> tuple[Tensor, Tensor]:
        """Token ids (rows,) int64 and logits (rows, V), see vLLM's sampler for the arguments."""
        if np.any(self.sampling_states.temperature.np[idx_mapping_np] != 0.0):
            drawn: tuple[Tensor, Tensor] = super()._sample_random(
                processed_logits, expanded_idx_mapping, idx_mapping_np, *args
            )
            return drawn
        # vLLM has taken top-k and top-p from greedy requests, so these are the logits that it would hand out, too.
        return processed_logits.argmax(dim=-1), processed_logits
