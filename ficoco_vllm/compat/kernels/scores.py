"""Outputs reported with the sampled tokens: log-probabilities, ranks and sampling masks; and replayed tokens."""

from typing import Any

import numpy as np
from torch import Tensor


def topk_log_softmax(
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    topk_ids_ptr: Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    **_: Any,
) -> None:
    """Log-probabilities of some tokens of each row, in float32."""
    values = logits_ptr.float()
    output_ptr.copy_(values.gather(1, topk_ids_ptr) - values.logsumexp(dim=1, keepdim=True))


def ranks(
    output_ptr: Tensor,
    logits_ptr: Tensor,
    logits_stride: int,
    token_ids_ptr: Tensor,
    vocab_size: int,
    **_: Any,
) -> None:
    """Number of tokens of each row that are at least as likely as a given one."""
    output_ptr.copy_((logits_ptr >= logits_ptr.gather(1, token_ids_ptr.unsqueeze(1))).sum(dim=1))


def fill_logprob_token_ids(
    out_token_ids_ptr: Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: Tensor,
    topk_indices_ptr: Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    num_per_req_token_ids_ptr: Tensor,
    per_req_token_ids_ptr: Tensor,
    per_req_token_ids_stride: int,
    NUM_TOPK: int,
    **_: Any,
) -> None:
    """Write the tokens that are reported: the sampled one, then those that the request names, or the likeliest."""
    out_token_ids_ptr[:, 0] = sampled_token_ids_ptr
    out_valid_mask_ptr[:, 0] = True
    for row, state in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_per_req_token_ids_ptr[state])
        tokens = per_req_token_ids_ptr[state, :count] if count else topk_indices_ptr[row, :NUM_TOPK]
        out_token_ids_ptr[row, 1 : 1 + len(tokens)] = tokens
        out_valid_mask_ptr[row, 1 : 1 + len(tokens)] = True


def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    **_: Any,
) -> None:
    """The token after each one of a prompt; 0 where there is none."""
    out, tokens = prompt_logprobs_token_ids_ptr.numpy(), all_token_ids_ptr.numpy()
    starts = query_start_loc_ptr.tolist()
    for row, state in enumerate(idx_mapping_ptr.tolist()):
        start, end = starts[row], starts[row + 1]
        first = int(num_computed_tokens_ptr[state]) + 1
        following = tokens[state, first : first + end - start]
        out[start:end] = 0
        out[start : start + len(following)] = following


def trace_replay(
    sampled_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    trace_token_ids_ptr: Tensor,
    trace_token_ids_stride: int,
    trace_len_ptr: Tensor,
    total_len_ptr: Tensor,
    prompt_len_ptr: Tensor,
    **_: Any,
) -> None:
    """Replace sampled tokens by those that a request replays."""
    for row, state in enumerate(idx_mapping_ptr.tolist()):
        if state < 0:
            continue
        step = int(total_len_ptr[state]) - int(prompt_len_ptr[state])
        if 0 <= step < int(trace_len_ptr[state]):
            sampled_ptr[row] = trace_token_ids_ptr[state, step]


def compact_sampling_mask(
    logits_ptr: Tensor,
    logits_row_stride: int,
    logits_col_stride: int,
    cu_num_logits_ptr: Tensor,
    num_sampled_tokens_ptr: Tensor,
    token_ids_ptr: Tensor,
    token_ids_row_stride: int,
    packed_mask_ptr: Tensor,
    packed_mask_row_stride: int,
    counts_ptr: Tensor,
    vocab_size: int,
    max_num_kept: int,
    ROWS_PER_REQUEST: int,
    **_: Any,
) -> None:
    """The tokens that could have been sampled: their number, the first ids, and all of them as bits."""
    starts, num_sampled = cu_num_logits_ptr.tolist(), num_sampled_tokens_ptr.tolist()
    for row in range(len(counts_ptr)):
        request, place = divmod(row, ROWS_PER_REQUEST)
        if place >= num_sampled[request]:
            counts_ptr[row] = 0
            continue
        possible = logits_ptr[starts[request] + place].isfinite()
        tokens = possible.nonzero().squeeze(1)
        counts_ptr[row] = len(tokens)
        kept = tokens[:max_num_kept]
        token_ids_ptr[row, : len(kept)] = kept
        packed_mask_ptr.numpy()[row] = np.packbits(possible.numpy(), bitorder="little")
