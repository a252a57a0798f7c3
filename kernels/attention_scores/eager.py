"""Attention scores in torch, one head at a time, so that no (B, H, M, N) map exists.

A loop over the heads, not over the images: its matrix products are large enough to be fast, and its scratch
space is 1/H of the map's. Half-precision inputs are widened one head at a time.
"""

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores.mask import Mask


def softmax_stats(
    query: Tensor, key: Tensor, scale: float, mask: Mask, column_weight: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """See `ops.softmax_stats`."""
    B, H, M, _ = query.shape
    N = key.shape[2]
    hidden = _hidden(B, M, N, mask, query.device)
    lse = query.new_empty((B, H, M), dtype=torch.float32)
    row_sum = query.new_zeros((B, M), dtype=torch.float32)
    for h in range(H):
        logits = _head_logits(query[:, h], key[:, h // (H // key.shape[1])], None, scale, mask.bias)
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
        highest = logits.amax(dim=-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = logits.sub_(highest).exp_()
        total = weights.sum(dim=-1)
        drawn = total
        if column_weight is not None:
            drawn = torch.bmm(weights, column_weight.float()[..., None])[..., 0]
        row_sum += torch.where(total > 0, drawn / total, 0.0)
        lse[:, h] = total.log().add_(highest[..., 0])
    return lse, row_sum.div_(num_heads)


def attention_block(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    row_index: Tensor | None,
    column_index: Tensor | None,
    mask: Mask,
    text: Tensor | None,
    gamma: float,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_block`."""
    B, M = query.shape[0], query.shape[2]
    hidden = _hidden(B, M, key.shape[2], mask, query.device, row_index, column_index)
    result = _head_sum(query, key, lse, scale, row_index, column_index, mask.bias).div_(num_heads)
    if hidden is not None:
        result.masked_fill_(hidden, 0.0)
    if text is not None:
        source, target = _columns(text, row_index).float(), _columns(text, column_index).float()
        result.baddbmm_(source.transpose(1, 2), target, beta=gamma, alpha=1.0 - gamma)
    return result


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    axis: int,
    weight: Tensor | None,
    mask: Mask,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_sums`."""
    B, _, M, _ = query.shape
    hidden = _hidden(B, M, key.shape[2], mask, query.device)
    attention = _head_sum(query, key, lse, scale, None, None, mask.bias)
    if hidden is not None:
        attention.masked_fill_(hidden, 0.0)
    if weight is None:
        return attention.sum(dim=axis).div_(num_heads)
    if axis == 2:
        return torch.bmm(attention, weight.float()[..., None])[..., 0].div_(num_heads)
    return torch.bmm(weight.float()[:, None], attention)[:, 0].div_(num_heads)


def cls_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    cls_index: int,
    bias: Tensor | None,
    with_keys: bool,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.cls_scores`."""
    B, H, N, d = query.shape
    group = H // key.shape[1]
    to_cls, from_cls = query.new_zeros((2, B, N), dtype=torch.float32)
    mean = query.new_zeros((B, N, d) if with_keys else (0,), dtype=torch.float32)
    for h in range(H):
        queries, keys = query[:, h].float(), key[:, h // group].float()
        absent = lse[:, h] == -torch.inf  # a token without a normaliser is padding
        offset = -lse[:, h, :, None].masked_fill(absent[..., None], torch.inf)
        if bias is not None:
            offset = offset + bias[:, None, cls_index : cls_index + 1].float()
        cls_key = keys[:, cls_index, :, None]
        to_cls += torch.baddbmm(offset, queries, cls_key, alpha=scale).exp_()[..., 0]
        offset = -lse[:, h, cls_index, None, None].expand(B, N, 1)
        if bias is not None:
            offset = offset + bias[:, :, None].float()
        cls_query = queries[:, cls_index, :, None]
        given = torch.baddbmm(offset, keys, cls_query, alpha=scale).exp_()[..., 0]
        from_cls += given.masked_fill_(absent, 0.0)
        if with_keys:
            mean += keys
    return to_cls.div_(num_heads), from_cls.div_(num_heads), mean.div_(num_heads)


def _head_sum(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    row_index: Tensor | None,
    column_index: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Sum over the heads of exp(logit - lse), before the mask, (B, R, K) fp32."""
    H = query.shape[1]
    group = H // key.shape[1]
    rows = None if row_index is None else row_index.clamp_min(0)
    columns = None if column_index is None else column_index.clamp_min(0)
    if bias is not None and columns is not None:
        bias = bias.gather(1, columns)
    result: Tensor | None = None
    for h in range(H):
        normaliser = lse[:, h] if rows is None else lse[:, h].gather(1, rows)
        # A query that sees nothing has -inf here and no attention.
        normaliser = torch.where(normaliser == -torch.inf, torch.inf, normaliser)
        keys = _take(key[:, h // group], columns)
        head = _head_logits(_take(query[:, h], rows), keys, normaliser, scale, bias).exp_()
        result = head if result is None else result.add_(head)
    assert result is not None
    return result


def _head_logits(
    query: Tensor, key: Tensor, normaliser: Tensor | None, scale: float, bias: Tensor | None
) -> Tensor:
    """One head: scale * q . k + bias - normaliser, (B, R, K) fp32."""
    B, R, K = query.shape[0], query.shape[1], key.shape[1]
    if normaliser is None:
        offset = query.new_zeros((1, 1, 1), dtype=torch.float32).expand(B, R, K)
    else:
        offset = -normaliser.float()[..., None].expand(B, R, K)
    logits = torch.baddbmm(offset, query.float(), key.float().transpose(1, 2), alpha=scale)
    return logits if bias is None else logits.add_(bias[:, None].float())


def _take(values: Tensor, index: Tensor | None) -> Tensor:
    """Rows (B, R, d) of (B, N, d)."""
    return values if index is None else values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))


def _columns(values: Tensor, index: Tensor | None) -> Tensor:
    """Columns (B, T, R) of (B, T, N), zeros where the index is -1."""
    if index is None:
        return values
    spread = index[:, None].expand(-1, values.shape[1], -1)
    return values.gather(2, spread.clamp_min(0)).masked_fill_(spread < 0, 0.0)


def _hidden(
    B: int,
    M: int,
    N: int,
    mask: Mask,
    device: torch.device,
    row_index: Tensor | None = None,
    column_index: Tensor | None = None,
) -> Tensor | None:
    """Pairs without attention, broadcastable to (B, R, K) bool, or None where there are none."""
    row = torch.arange(M, device=device)[None] if row_index is None else row_index
    column = torch.arange(N, device=device)[None] if column_index is None else column_index
    row, column = row[:, :, None], column[:, None, :]
    parts = []
    if row_index is not None:
        parts.append(row < 0)
    if column_index is not None:
        parts.append(column < 0)
    if mask.query_length is not None:
        parts.append(row >= mask.query_length[:, None, None])
    if mask.key_length is not None:
        parts.append(column >= mask.key_length[:, None, None])
    if mask.causal:
        last = row if mask.offset is None else row + mask.offset[:, None, None]
        parts.append(column > last)
    hidden = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden
