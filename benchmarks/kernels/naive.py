"""The obvious way to each result in torch: write the attention map, then index it."""

import torch
from torch import Tensor


def attention_map(query: Tensor, key: Tensor, scale: float, causal: bool) -> Tensor:
    """Head-mean attention (B, M, N) fp32, by way of the whole (B, H, M, N) map."""
    logits = (query @ key.transpose(-1, -2)).float() * scale
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(dim=-1).mean(dim=1)


def tower_scores(
    query: Tensor, key: Tensor, scale: float, source: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Row sums and [CLS] row of the patches, and the correlation; indices into all tokens."""
    attention = attention_map(query, key, scale, causal=False)
    return attention[:, 1:, 1:].sum(-1), attention[:, 0, 1:], pick(attention, source, target)


def decoder_scores(
    query: Tensor, key: Tensor, scale: float, source: Tensor, target: Tensor, text_rows: Tensor, visual: slice
) -> tuple[Tensor, ...]:
    """Row sums over the visual tokens, what the text gives, and Eq. 15; indices into the prompt."""
    attention = attention_map(query, key, scale, causal=True)
    batch = torch.arange(len(source), device=source.device)[:, None]
    text = attention[batch, text_rows]
    received = text.transpose(1, 2)
    indirect = received[batch, source] @ received[batch, target].transpose(1, 2)
    correlation = 0.6 * pick(attention, source, target) + 0.4 * indirect
    return attention[:, visual, visual].sum(-1), text.sum(1)[:, visual], correlation


def pick(attention: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Rows and columns of a map (B, N, N) by index, (B, R, K)."""
    batch = torch.arange(len(source), device=source.device)[:, None, None]
    return attention[batch, source[:, :, None], target[:, None, :]]


def merge(
    tokens: Tensor, size: Tensor, correlation: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, ...]:
    """Eq. 13 line by line."""
    batch = torch.arange(len(source), device=source.device)[:, None]
    threshold = torch.quantile(correlation, 0.998, dim=-1, keepdim=True)
    weight = torch.where(correlation >= threshold, correlation, 0.0)
    alpha = weight / weight.sum(dim=-1, keepdim=True)
    flow = alpha.transpose(1, 2) @ tokens[batch, source].float()
    merged = (tokens[batch, target].float() + flow) / (1 + alpha.sum(dim=1)[..., None])
    moved = size[batch, target] + (alpha * size[batch, source][..., None]).sum(dim=1)
    return merged.to(tokens.dtype), moved
