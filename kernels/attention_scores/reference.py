"""Attention scores as the equations have them, in float64 and with the whole (B, H, M, N) map."""

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores.mask import Mask


def visible(B: int, M: int, N: int, mask: Mask) -> Tensor:
    """Which query sees which key.

    Returns:
        (B, M, N) bool.
    """
    query, key = torch.arange(M)[None, :, None], torch.arange(N)[None, None, :]
    seen = torch.ones((B, M, N), dtype=torch.bool)
    if mask.query_length is not None:
        seen &= query < mask.query_length[:, None, None]
    if mask.key_length is not None:
        seen &= key < mask.key_length[:, None, None]
    if mask.causal:
        offset = torch.zeros(B, dtype=torch.int64) if mask.offset is None else mask.offset
        seen &= key <= query + offset[:, None, None]
    return seen


def logits(query: Tensor, key: Tensor, scale: float, mask: Mask) -> Tensor:
    """Logits scale * q_i . k_j + bias_j, and -inf where i does not see j.

    Args:
        query: (B, H, M, d), any floating dtype.
        key: (B, Hk, N, d), Hk divides H.
        scale: factor of the products.
        mask: see `Mask`.

    Returns:
        (B, H, M, N) fp64.
    """
    B, H, M, _ = query.shape
    key = key.double().repeat_interleave(H // key.shape[1], dim=1)
    result = scale * query.double() @ key.transpose(-1, -2)
    if mask.bias is not None:
        result = result + mask.bias.double()[:, None, None, :]
    return result.masked_fill(~visible(B, M, key.shape[2], mask)[:, None], -torch.inf)


def log_sum_exp(query: Tensor, key: Tensor, scale: float, mask: Mask) -> Tensor:
    """Normalisers log sum_j exp(logit_ij), (B, H, M) fp64; -inf for a query that sees nothing."""
    return logits(query, key, scale, mask).logsumexp(dim=-1)


def attention(query: Tensor, key: Tensor, scale: float, mask: Mask, num_heads: int | None = None) -> Tensor:
    """Softmax attention, summed over the heads given and divided by `num_heads` (all those given, if None).

    Returns:
        (B, M, N) fp64; a query that sees nothing has a row of zeros.

    Source: arXiv:2411.17686, Eq. 2.
    """
    raw = logits(query, key, scale, mask)
    probabilities = torch.softmax(raw, dim=-1).masked_fill(raw == -torch.inf, 0.0)
    return probabilities.sum(dim=1) / (num_heads or query.shape[1])


def pick(values: Tensor, index: Tensor | None, dim: int) -> Tensor:
    """Entries along one dimension (1 or 2) of (B, M, N) by index (B, R); zeros where the index is -1."""
    if index is None:
        return values
    shape = [values.shape[0], values.shape[1], values.shape[2]]
    shape[dim] = index.shape[1]
    spread = index.unsqueeze(3 - dim).expand(shape)
    return values.gather(dim, spread.clamp_min(0)) * (spread >= 0)


def via_text(direct: Tensor, text: Tensor, source: Tensor, target: Tensor, gamma: float) -> Tensor:
    """C_ij = gamma * A_ij + (1 - gamma) * sum_k A_ki * A_kj, with k over the text tokens.

    Args:
        direct: (B, R, K), A_ij.
        text: (B, T, N) attention of the text tokens, in the numbering of the indices.
        source: (B, R) int64.
        target: (B, K) int64.
        gamma: weight of the direct term.

    Returns:
        (B, R, K) fp64.

    Source: arXiv:2411.17686, Eq. 15.
    """
    received = text.double()
    indirect = pick(received, source, 2).transpose(1, 2) @ pick(received, target, 2)
    return gamma * direct + (1.0 - gamma) * indirect
