"""LoRA adapters of the rows of a step, which change from segment to segment."""

from typing import Any

from torch import Tensor


class StepAdapters:
    """Assignment of rows to adapters, which vLLM makes once for a step and all layers."""

    def __init__(self, wrapper: Any) -> None:
        """Store the assignment of the step's tokens.

        Args:
            wrapper: vLLM's punica wrapper, which all layers share.
        """
        self.wrapper = wrapper
        self.token_index: Tensor = wrapper.token_lora_indices.clone()

    @classmethod
    def of(cls, attention: Any) -> "StepAdapters | None":
        """The adapters of a step; None where the server has none.

        Args:
            attention: vLLM's attention module of any decoder layer.
        """
        wrapper = getattr(attention.qkv_proj, "punica_wrapper", None)
        return None if wrapper is None or not wrapper.indices_len[0] else cls(wrapper)

    def assign(self, origin: Tensor) -> None:
        """Assign rows to the adapters of their tokens.

        Args:
            origin: (rows,) int64, the token of the step that each row is.
        """
        wrapper, index = self.wrapper, self.token_index[origin]
        wrapper._token_lora_indices[: len(index)].copy_(index)
        wrapper.indices_len[0] = len(index)
        kernels = getattr(wrapper, "token_mapping_meta", None)
        if kernels is not None:
            kernels.prepare_tensors(wrapper.token_lora_indices)
        else:  # vLLM's wrapper for CPUs
            wrapper._update_prefill_metadata(wrapper.token_lora_indices)
