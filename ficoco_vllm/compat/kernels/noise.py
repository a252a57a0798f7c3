"""The choice of a token: the largest logit, with Gumbel noise where the temperature is not 0.

The noise is a function of seed, position and token (MurmurHash3), the same one as on a GPU, so that a seed repeats an
answer, whatever else is in the batch.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint32]
_WORD = 0xFFFFFFFF
_SECOND_STREAM = 0x9E3779B9


def gumbel_sample(
    local_argmax_ptr: Tensor,
    local_argmax_stride: int,
    local_max_ptr: Tensor,
    local_max_stride: int,
    logits_cache_ptr: Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: Tensor | None,
    logits_cache_source_ptr: Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: Tensor,
    seeds_ptr: Tensor,
    pos_ptr: Tensor,
    temp_ptr: Tensor,
    vocab_size: int,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    **_: Any,
) -> None:
    """Sample a token from each row of logits.

    The kernel leaves the choice between blocks of the vocabulary to its caller; here the first block holds the result.
    """
    assert logits_cache_ptr is None, "only draft models cache logits"
    states = expanded_idx_mapping_ptr.tolist()
    temperatures = temp_ptr[expanded_idx_mapping_ptr].tolist()
    chosen = logits_ptr.argmax(dim=1)
    for row, value in enumerate(temperatures):
        if value:
            noise = gumbel_noise(int(seeds_ptr[states[row]]), int(pos_ptr[row]), vocab_size, USE_FP64)
            values = logits_ptr[row].float()
            values = values / value if APPLY_TEMPERATURE else values
            chosen[row] = (values + torch.from_numpy(noise)).argmax()
    local_max_ptr.fill_(-torch.inf)[:, 0] = 0
    local_argmax_ptr[:, 0] = chosen


def gumbel_noise(seed: int, position: int, vocab_size: int, double: bool = False) -> npt.NDArray[Any]:
    """Gumbel noise of a step of a request.

    Args:
        seed: seed of the request, int64.
        position: position of the token that the logits follow.
        vocab_size: V.
        double: whether to draw 53 random bits for each token instead of 32.

    Returns:
        (V,) float32, or float64 if `double`.
    """
    low = _hash(seed, position, vocab_size)
    if double:
        high = _hash(seed, position, vocab_size, domain=_SECOND_STREAM).astype(np.uint64)
        uniform64 = ((high << 32 | low) >> 11).astype(np.float64) + 0.5
        uniform64 *= 2.0**-53
        noise64: npt.NDArray[np.float64] = -np.log(-np.log(np.minimum(uniform64, 1 - 2.0**-53)))
        return noise64
    upper, lower = (low >> 16).astype(np.float32), (low & 0xFFFF).astype(np.float32)
    uniform = upper * np.float32(2.0**-16) + (lower + np.float32(0.5)) * np.float32(2.0**-32)
    noise: npt.NDArray[np.float32] = -np.log(-_log1p_neg(uniform))
    return noise


def _log1p_neg(value: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """log(1 - value), by a series where it is small, as the kernel does it for backends without log1p."""
    series = np.full_like(value, 1 / 8)
    for degree in range(7, 0, -1):
        series = np.float32(1 / degree) + value * series
    direct = np.log(np.maximum(1 - value, np.float32(2.0**-24)))
    return np.where(value < 0.25, -value * series, direct)


def _hash(seed: int, position: int, vocab_size: int, domain: int = 0) -> Words:
    """MurmurHash3 of seed, position and each token."""
    prefix = domain
    for word in (seed & _WORD, seed >> 32 & _WORD, position & _WORD):
        mixed = prefix ^ _rotate(word * 0xCC9E2D51 & _WORD, 15) * 0x1B873593 & _WORD
        prefix = _rotate(mixed, 13) * 5 + 0xE6546B64 & _WORD
    value = _rotated(_token_keys(vocab_size) ^ np.uint32(prefix), 13) * np.uint32(5) + np.uint32(0xE6546B64)
    value ^= np.uint32(16)
    value ^= value >> np.uint32(16)
    value *= np.uint32(0x85EBCA6B)
    value ^= value >> np.uint32(13)
    value *= np.uint32(0xC2B2AE35)
    value ^= value >> np.uint32(16)
    return value


def _rotate(word: int, by: int) -> int:
    return (word << by | word >> 32 - by) & _WORD


def _rotated(words: Words, by: int) -> Words:
    return words << np.uint32(by) | words >> np.uint32(32 - by)


@lru_cache
def _token_keys(vocab_size: int) -> Words:
    """The tokens' part of the hash, which no request changes."""
    keys = np.arange(vocab_size, dtype=np.uint32) * np.uint32(0xCC9E2D51)
    return _rotated(keys, 15) * np.uint32(0x1B873593)
