"""Inputs of a step: token ids, positions, lengths, and the state of the requests after it.

All tensors hold integers on the CPU, so numpy reads and writes their memory. `idx_mapping` maps a request of the step
to its state.
"""

from typing import Any

import numpy as np
from torch import Tensor


def prepare_prefill_inputs(
    input_ids_ptr: Tensor,
    next_prefill_tokens_ptr: Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    **_: Any,
) -> None:
    """Write the token ids of prompts, and the ones that the next step needs first."""
    input_ids, ahead = input_ids_ptr.numpy(), next_prefill_tokens_ptr.numpy()
    tokens = all_token_ids_ptr.numpy()
    prefill_lens, computed = prefill_lens_ptr.numpy(), num_computed_tokens_ptr.numpy()
    starts = query_start_loc_ptr.tolist()
    for row, state in enumerate(idx_mapping_ptr.tolist()):
        begin, length = int(computed[state]), int(prefill_lens[state])
        if begin >= length:
            continue
        end = begin + starts[row + 1] - starts[row]
        input_ids[starts[row] : starts[row + 1]] = tokens[state, begin:end]
        following = tokens[state, end : min(end + num_lookahead, length)]
        ahead[:, state] = 0
        ahead[: len(following), state] = following


def prepare_pos_seq_lens(
    pos_ptr: Tensor,
    seq_lens_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    max_num_reqs: int,
    **_: Any,
) -> None:
    """Write the position of each token and the length of each sequence; unused lengths are 0."""
    states = idx_mapping_ptr.numpy()
    starts = query_start_loc_ptr.numpy()[: len(states) + 1]
    computed = num_computed_tokens_ptr.numpy()[states]
    lengths = np.diff(starts)
    seq_lens = seq_lens_ptr.numpy()
    seq_lens[: len(states)] = computed + lengths
    seq_lens[len(states) : max_num_reqs] = 0
    first, last = int(starts[0]), int(starts[-1])
    pos_ptr.numpy()[first:last] = np.arange(first, last) + np.repeat(computed - starts[:-1], lengths)


def prepare_rope_positions(
    positions_ptr: Tensor,
    positions_stride: int,
    prefill_positions_ptr: Tensor,
    prefill_positions_stride0: int,
    prefill_positions_stride1: int,
    prefill_delta_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    prefill_lens_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_DIMS: int,
    **_: Any,
) -> None:
    """Write the positions of each token for M-RoPE: those of its prompt, or its index plus an offset in an answer."""
    positions, of_prompts = positions_ptr.numpy(), prefill_positions_ptr.numpy()
    deltas = prefill_delta_ptr.numpy()
    prefill_lens, computed = prefill_lens_ptr.numpy(), num_computed_tokens_ptr.numpy()
    starts = query_start_loc_ptr.tolist()
    for row, state in enumerate(idx_mapping_ptr.tolist()):
        begin, length = int(computed[state]), starts[row + 1] - starts[row]
        if begin < prefill_lens[state]:
            values = of_prompts[state * NUM_DIMS : (state + 1) * NUM_DIMS, begin : begin + length]
        else:
            values = np.arange(begin, begin + length) + deltas[state]
        positions[:, starts[row] : starts[row + 1]] = values


def combine_sampled_and_draft_tokens(
    input_ids_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    query_start_loc_ptr: Tensor,
    seq_lens_ptr: Tensor,
    prefill_len_ptr: Tensor,
    draft_tokens_ptr: Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: Tensor,
    logits_indices_ptr: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
    **_: Any,
) -> None:
    """Write the rows that are sampled from, and the token ids of answers: the last sampled one and its drafts."""
    states = idx_mapping_ptr.numpy()
    input_ids, drafts = input_ids_ptr.numpy(), draft_tokens_ptr.numpy()
    first_logit = cu_num_logits_ptr.numpy()[: len(states) + 1]
    num_logits = np.diff(first_logit)
    ends = query_start_loc_ptr.numpy()[1 : len(states) + 1]
    indices = np.arange(first_logit[0], first_logit[-1])
    logits_indices_ptr.numpy()[indices] = indices + np.repeat(
        ends - num_logits - first_logit[:-1], num_logits
    )
    lengths, prefilled = seq_lens_ptr.numpy()[: len(states)], prefill_len_ptr.numpy()[states]
    answers = lengths > prefilled
    if NUM_NEW_SAMPLED_TOKENS:
        written = answers & (lengths - num_logits >= prefilled)
        last = last_sampled_tokens_ptr.numpy().reshape(-1)
        input_ids[(ends - num_logits)[written]] = last[states[written]]
    num_drafts = num_logits - NUM_NEW_SAMPLED_TOKENS
    for row in np.flatnonzero(answers & (num_drafts > 0)):
        input_ids[ends[row] - num_drafts[row] : ends[row]] = drafts[states[row], : num_drafts[row]]


def get_num_sampled_and_rejected(
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    seq_lens_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    idx_mapping_ptr: Tensor,
    prefill_len_ptr: Tensor,
    **_: Any,
) -> None:
    """Write the number of rejected drafts; a prompt that has not been computed whole samples and rejects nothing."""
    states = idx_mapping_ptr.numpy()
    num_sampled = num_sampled_ptr.numpy()
    partial = seq_lens_ptr.numpy()[: len(states)] < prefill_len_ptr.numpy()[states]
    num_sampled[partial] = 0
    num_logits = np.diff(cu_num_logits_ptr.numpy()[: len(states) + 1])
    num_rejected_ptr.numpy()[:] = np.where(partial, 0, num_logits - num_sampled)


def post_update(
    idx_mapping_ptr: Tensor,
    num_computed_tokens_ptr: Tensor,
    last_sampled_tokens_ptr: Tensor,
    output_bin_counts_ptr: Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: Tensor,
    num_rejected_ptr: Tensor,
    query_start_loc_ptr: Tensor | None,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    total_len_ptr: Tensor,
    draft_tokens_ptr: Tensor | None = None,
    draft_tokens_out_ptr: Tensor | None = None,
    num_draft_tokens: int = 0,
    **_: Any,
) -> None:
    """Append the sampled tokens to the requests; rows with a negative state are left out.

    vLLM 0.33 keeps the drafts of each request, too.
    """
    states = idx_mapping_ptr.numpy()
    rows = np.flatnonzero(states >= 0)
    states = states[rows]
    if draft_tokens_ptr is not None:
        assert draft_tokens_out_ptr is not None
        draft_tokens_out_ptr.numpy()[states] = draft_tokens_ptr.numpy()[rows]
    count = num_sampled_ptr.numpy()[rows]
    sampled, total = sampled_tokens_ptr.numpy(), total_len_ptr.numpy()
    for place in range(int(count.max(initial=0))):
        more = count > place
        state = states[more]
        tokens = sampled[rows[more], place]
        all_token_ids_ptr.numpy()[state, total[state] + place] = tokens
        if output_bin_counts_ptr is not None:
            output_bin_counts_ptr.numpy()[state, tokens] += 1
    any_sampled = count > 0
    last = last_sampled_tokens_ptr.numpy().reshape(-1)
    last[states[any_sampled]] = sampled[rows[any_sampled], count[any_sampled] - 1]
    total[states] += count
    delta = -num_rejected_ptr.numpy()[rows]
    if query_start_loc_ptr is not None:
        delta = delta + np.diff(query_start_loc_ptr.numpy())[rows]
    num_computed_tokens_ptr.numpy()[states] += delta


def post_update_num_computed_tokens(
    idx_mapping_ptr: Tensor, num_computed_tokens_ptr: Tensor, query_start_loc_ptr: Tensor, **_: Any
) -> None:
    """Add the tokens of the step to the computed ones."""
    states = idx_mapping_ptr.numpy()
    num_computed_tokens_ptr.numpy()[states] += np.diff(query_start_loc_ptr.numpy()[: len(states) + 1])


def expand_idx_mapping(
    idx_mapping_ptr: Tensor,
    expanded_idx_mapping_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    **_: Any,
) -> None:
    """Write the state of each row of logits, and its place among the rows of its request."""
    states = idx_mapping_ptr.numpy()
    starts = cu_num_logits_ptr.numpy()[: len(states) + 1]
    num_logits = np.diff(starts)
    rows = slice(int(starts[0]), int(starts[-1]))
    expanded_idx_mapping_ptr.numpy()[rows] = np.repeat(states, num_logits)
    expanded_local_pos_ptr.numpy()[rows] = np.arange(rows.start, rows.stop) - np.repeat(
        starts[:-1], num_logits
    )
