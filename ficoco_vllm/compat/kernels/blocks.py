"""Block tables and staged writes as methods of vLLM's classes.

Their Triton kernels receive addresses of tensors; the methods that launch them have the tensors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

# vLLM's mark of a token without a place in the KV cache.
_PADDING = -1


def apply_write(self: Any) -> None:
    """`StagedWriteTensor.apply_write`: write what has been staged, and forget it."""
    if not self._staged_write_indices:
        return
    memory, stride = self.gpu.numpy().reshape(-1), self.gpu.stride(0)
    contents = np.asarray(self._staged_write_contents, dtype=memory.dtype)
    begin = 0
    writes = (self._staged_write_indices, self._staged_write_starts, self._staged_write_cu_lens)
    for index, start, end in zip(*writes, strict=True):
        first = index * stride + start
        memory[first : first + end - begin] = contents[begin:end]
        begin = end
    self.clear_staged_writes()


def apply(self: Any, tensors: Sequence[Any], output_ptrs: Tensor, output_strides: Tensor) -> None:
    """`FusedStagedWriter.apply`: the same for several tensors."""
    for tensor in tensors:
        apply_write(tensor)


def gather_block_tables(
    self: Any,
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
    num_computed_tokens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """`BlockTables.gather_block_tables`: copy the tables of a step's requests, group by group; padded rows are 0.

    vLLM 0.33 hides blocks below a sliding window, which only groups with such a window have.
    """
    hides = num_computed_tokens is not None and self.has_sliding_window_groups
    assert not hides, "methods of the decoder, which alone use this runner on a CPU, refuse sliding windows"
    outs = tuple(self.input_block_tables) if out is None else out
    states = idx_mapping.numpy()
    num_blocks = self.num_blocks.np[:, states].max(axis=1, initial=0).tolist()
    for table, target, width in zip(self.block_tables, outs, num_blocks, strict=True):
        rows = target.numpy()
        rows[: len(states), :width] = table.gpu.numpy()[states, :width]
        rows[len(states) : num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in outs)


def compute_slot_mappings(
    self: Any,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Tensor:
    """`BlockTables.compute_slot_mappings`: places of a step's tokens in the KV cache of each group.

    Tokens beyond the step's, and those of requests without a state, have none.
    """
    assert self.cp_size == 1, "vLLM's CPU platform has no context parallelism"
    target: Tensor = self.slot_mappings if out is None else out
    slots, states = target.numpy(), idx_mapping.numpy()
    starts = query_start_loc.numpy()[: len(states) + 1]
    num_tokens = int(starts[-1])
    slots[:, num_tokens:] = _PADDING
    of_token = np.repeat(states, np.diff(starts))
    places = positions.numpy()[:num_tokens]
    for group, (table, size) in enumerate(zip(self.block_tables, self.block_sizes, strict=True)):
        if not self._slot_mapping_enabled[group]:
            slots[group, :num_tokens] = _PADDING
            continue
        blocks = table.gpu.numpy()[of_token, places // size].astype(np.int64)
        slots[group, :num_tokens] = np.where(of_token < 0, _PADDING, blocks * size + places % size)
    return target[:, :num_tokens_padded]
