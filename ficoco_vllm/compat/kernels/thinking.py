"""Thinking budgets: the end of the thinking is forced once its tokens are used up."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

# Logit of a forced token.
_FORCED = 1.0e9


def update_cache(
    req_ids_ptr: Tensor,
    thinking_token_budget_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    cached_last_start_ptr: Tensor,
    cached_last_end_ptr: Tensor,
    cached_scan_pos_ptr: Tensor,
    reasoning_start_token_ids_ptr: Tensor,
    natural_reasoning_end_token_ids_ptr: Tensor,
    **_: Any,
) -> None:
    """Cache nothing: `thinking_budget` searches all tokens, which takes numpy a few microseconds."""


def thinking_budget(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    thinking_token_budget_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cached_last_start_ptr: Tensor,
    cached_last_end_ptr: Tensor,
    reasoning_start_token_ids_ptr: Tensor,
    natural_reasoning_end_token_ids_ptr: Tensor,
    reasoning_end_token_ids_ptr: Tensor,
    **_: Any,
) -> None:
    """Force the next token of the end sequence in rows whose budget is used up; drafts before a row count."""
    start, natural_end = reasoning_start_token_ids_ptr.numpy(), natural_reasoning_end_token_ids_ptr.numpy()
    end = reasoning_end_token_ids_ptr.tolist()
    places = expanded_local_pos_ptr.tolist()
    for row, state in enumerate(expanded_idx_mapping_ptr.tolist()):
        budget = int(thinking_token_budget_ptr[state])
        if budget < 0:
            continue
        committed = all_token_ids_ptr[state, : int(total_len_ptr[state])].numpy()
        tokens = np.concatenate([committed, input_ids_ptr[row - places[row] + 1 : row + 1].numpy()])
        begun = _last(tokens, start)
        if begun <= _last(tokens, natural_end) or len(tokens) - begun - len(start) < budget:
            continue
        # An end sequence that has begun is continued.
        lengths = range(min(len(end) - 1, len(tokens)), 0, -1)
        done = next((length for length in lengths if tokens[-length:].tolist() == end[:length]), 0)
        logits_ptr[row, end[done]] = _FORCED


def _last(tokens: npt.NDArray[np.integer[Any]], marker: npt.NDArray[np.integer[Any]]) -> int:
    """Start of the last occurrence of a marker, or -1."""
    if len(tokens) < len(marker):
        return -1
    places = np.flatnonzero(
        (np.lib.stride_tricks.sliding_window_view(tokens, len(marker)) == marker).all(axis=1)
    )
    return int(places[-1]) if len(places) else -1
