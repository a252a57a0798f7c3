"""Attention scores as in the equations, in float64 and with the whole (B, H, M, N) map."""

from typing import Any

import torch
from torch import Tensor


def logits(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None = None,
    causal: bool = False,
    offset: Tensor | None = None,
    query_length: Tensor | None = None,
) -> Tensor:
    """Logits scale * q_i . k_j + bias_j, and -inf where i does not see j; arguments as of `ops.softmax_stats`.

    Returns:
        (B, H, M, N) fp64.
    """
    B, H, M, _ = query.shape
    key = key.double().repeat_interleave(H // key.shape[1], dim=1)
    result = scale * query.double() @ key.transpose(-1, -2)
    if bias is not None:
        result = result + bias.double()[:, None, None, :]
    i, j = torch.arange(M)[:, None], torch.arange(key.shape[2])
    seen = torch.ones((B, M, key.shape[2]), dtype=torch.bool)
    if query_length is not None:
        seen &= i < query_length[:, None, None]
    if causal:
        seen &= j <= i + (torch.zeros(B, dtype=torch.int64) if offset is None else offset)[:, None, None]
    return result.masked_fill(~seen[:, None], -torch.inf)


def log_sum_exp(query: Tensor, key: Tensor, scale: float, **mask: Any) -> Tensor:
    """Normalisers log sum_j exp(logit_ij), (B, H, M) fp64; -inf for a query that sees nothing."""
    return logits(query, key, scale, **mask).logsumexp(dim=-1)


def attention(query: Tensor, key: Tensor, scale: float, **mask: Any) -> Tensor:
    """Head-mean softmax attention.

    Returns:
        (B, M, N) fp64; a query that sees nothing has a row of zeros.

    Source: arXiv:2411.17686, Eq. 2.
    """
    raw = logits(query, key, scale, **mask)
    return torch.softmax(raw, dim=-1).masked_fill(raw == -torch.inf, 0.0).mean(dim=1)


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
