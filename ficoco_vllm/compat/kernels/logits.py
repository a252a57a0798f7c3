"""Logits before the choice of a token: grammar, bias, penalties, bad words, temperature and min-p, in place.

`logits_ptr` is (rows, V); `expanded_idx_mapping_ptr` maps each row to the state of its request. A token id outside of
the vocabulary has no logit and is ignored.
"""

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def apply_grammar_bitmask(
    logits_ptr: Tensor,
    logits_stride: int,
    logits_indices_ptr: Tensor,
    cu_num_logits_ptr: Tensor,
    bitmask_ptr: Tensor,
    bitmask_stride: int,
    vocab_size: int,
    MASK_STRIDE: int,
    **_: Any,
) -> None:
    """Forbid the tokens whose bit is 0 in the mask of a row."""
    starts = cu_num_logits_ptr.tolist()
    for mask, index in zip(unpack(bitmask_ptr, vocab_size), logits_indices_ptr.tolist(), strict=True):
        request, place = divmod(index, MASK_STRIDE)
        if place < starts[request + 1] - starts[request]:
            logits_ptr[starts[request] + place].masked_fill_(~mask, -torch.inf)


def unpack(packed: Tensor, num_bits: int) -> Tensor:
    """Bits of rows of int32, lowest first.

    Args:
        packed: (rows, words) int32.
        num_bits: number of bits of a row to return; those beyond the words are 0.

    Returns:
        (rows, num_bits) bool.
    """
    words: npt.NDArray[np.uint8] = np.ascontiguousarray(packed.numpy()).view(np.uint8)
    return torch.from_numpy(np.unpackbits(words, axis=1, count=num_bits, bitorder="little").view(np.bool_))


def num_nans(logits_ptr: Tensor, logits_stride: int, num_nans_ptr: Tensor, vocab_size: int, **_: Any) -> None:
    """Count the NaN of each row."""
    num_nans_ptr.copy_(logits_ptr.isnan().sum(dim=1))


def bias(
    logits_ptr: Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: Tensor,
    num_allowed_token_ids_ptr: Tensor,
    allowed_token_ids_ptr: Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: Tensor,
    bias_token_ids_ptr: Tensor,
    bias_token_ids_stride: int,
    bias_ptr: Tensor,
    bias_stride: int,
    pos_ptr: Tensor,
    min_lens_ptr: Tensor,
    num_stop_token_ids_ptr: Tensor,
    restore_when_all_masked_ptr: Tensor,
    stop_token_ids_ptr: Tensor,
    stop_token_ids_stride: int,
    BLOCK_SIZE: int,
    LOGITS_BLOCK_SIZE: int,
    CHECK_ALL_MASKED_ROWS: bool,
    **_: Any,
) -> None:
    """Apply allowed tokens, biases, and the ban on stop tokens before the shortest length, in this order."""

    def valid(token_ids: Tensor, state: int, count: int) -> Tensor:
        ids = token_ids[state, :count].long()
        return ids[(ids >= 0) & (ids < vocab_size)]

    positions = pos_ptr.tolist()
    for row, state in enumerate(expanded_idx_mapping_ptr.tolist()):
        logits = logits_ptr[row]
        if count := int(num_allowed_token_ids_ptr[state]):
            allowed = valid(allowed_token_ids_ptr, state, count)
            kept = logits[allowed]
            logits.fill_(-torch.inf)
            logits[allowed] = kept
        if count := int(num_logit_bias_ptr[state]):
            # vLLM refuses biased tokens outside of the vocabulary, so each has its bias.
            logits[bias_token_ids_ptr[state, :count].long()] += bias_ptr[state, :count]
        count = int(num_stop_token_ids_ptr[state])
        if count and positions[row] + 1 < int(min_lens_ptr[state]):
            stops = valid(stop_token_ids_ptr, state, count)
            kept = logits[stops]
            logits[stops] = -torch.inf
            restores = CHECK_ALL_MASKED_ROWS and bool(restore_when_all_masked_ptr[state])
            if restores and bool((logits == -torch.inf).all()):
                finite = kept.isfinite()
                logits[stops[finite]] = kept[finite]


def bincount(
    expanded_idx_mapping_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    prefill_len_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    **_: Any,
) -> None:
    """Record the tokens of a prompt as bits, and count those of the answer so far."""
    masks, counts = prompt_bin_mask_ptr.numpy(), output_bin_counts_ptr.numpy()
    for state in expanded_idx_mapping_ptr.tolist():
        prompt_len, length = int(prompt_len_ptr[state]), int(prefill_len_ptr[state])
        tokens = all_token_ids_ptr[state, :length].numpy()
        present = np.zeros(masks.shape[1] * 32, dtype=np.bool_)
        prompt, answer = tokens[:prompt_len], tokens[prompt_len:]
        present[prompt[(prompt >= 0) & (prompt < len(present))]] = True
        masks[state] |= np.packbits(present, bitorder="little").view(np.int32)
        np.add.at(counts[state], answer, 1)


def penalties(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    token_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    repetition_penalty_ptr: Tensor,
    frequency_penalty_ptr: Tensor,
    presence_penalty_ptr: Tensor,
    prompt_bin_mask_ptr: Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    **_: Any,
) -> None:
    """Apply repetition, frequency and presence penalties; drafts before a row count as its answer."""
    states, tokens = expanded_idx_mapping_ptr.long(), token_ids_ptr.tolist()
    counts = output_bin_counts_ptr[states, :vocab_size]
    for row, place in enumerate(expanded_local_pos_ptr.tolist()):
        for token in tokens[row - place + 1 : row + 1]:
            counts[row, token] += 1
    answered = counts > 0
    seen = unpack(prompt_bin_mask_ptr[states], vocab_size) | answered
    penalty = repetition_penalty_ptr[states].unsqueeze(1)
    scale = torch.where(seen, penalty, 1.0)
    values = logits_ptr.float()
    values = values * torch.where(values > 0, 1.0 / scale, scale)
    values -= frequency_penalty_ptr[states].unsqueeze(1) * counts
    values -= presence_penalty_ptr[states].unsqueeze(1) * answered
    logits_ptr.copy_(values)


def bad_words(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    bad_word_token_ids_ptr: Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: Tensor,
    all_token_ids_ptr: Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: Tensor,
    total_len_ptr: Tensor,
    input_ids_ptr: Tensor,
    expanded_local_pos_ptr: Tensor,
    **_: Any,
) -> None:
    """Forbid the last token of each bad word whose other tokens end the answer so far."""
    inputs = input_ids_ptr.tolist()
    places = expanded_local_pos_ptr.tolist()
    for row, state in enumerate(expanded_idx_mapping_ptr.tolist()):
        count = int(num_bad_words_ptr[state])
        if not count:
            continue
        answer = all_token_ids_ptr[state, int(prompt_len_ptr[state]) : int(total_len_ptr[state])].tolist()
        answer += inputs[row - places[row] + 1 : row + 1]
        offsets = bad_word_offsets_ptr[state, : count + 1].tolist()
        words = bad_word_token_ids_ptr[state, : offsets[-1]].tolist()
        for start, end in pairwise(offsets):
            *prefix, last = words[start:end]
            ends = len(prefix) <= len(answer) and prefix == answer[len(answer) - len(prefix) :]
            if ends and last < logits_ptr.shape[1]:
                logits_ptr[row, last] = -torch.inf


def temperature(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    temperature_ptr: Tensor,
    vocab_size: int,
    **_: Any,
) -> None:
    """Divide by the temperature; rows of greedy requests are unchanged."""
    values = temperature_ptr[expanded_idx_mapping_ptr].unsqueeze(1)
    logits_ptr.div_(values.masked_fill(values == 0, 1.0))


def min_p(
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    min_p_ptr: Tensor,
    vocab_size: int,
    **_: Any,
) -> None:
    """Forbid tokens whose probability is less than min-p times the largest one."""
    threshold = logits_ptr.amax(dim=1, keepdim=True) + min_p_ptr[expanded_idx_mapping_ptr].log().unsqueeze(1)
    logits_ptr.masked_fill_(logits_ptr < threshold, -torch.inf)
