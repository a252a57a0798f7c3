"""Attention scores in torch, a few heads at a time, so that no (B, H, M, N) map exists.

A loop over groups of heads, not over the images. A group is as large as fits into a processor's cache: small
problems are one group and pay for no loop, large ones hold a fraction of the map. Half-precision inputs are
widened one group at a time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ficoco_vllm.kernels.attention_scores.mask import Mask

_GROUP_BYTES = 4 * 2**20


def softmax_stats(
    query: Tensor, key: Tensor, scale: float, mask: Mask, column_weight: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """See `ops.softmax_stats`."""
    B, H, M, _ = query.shape
    N = key.shape[2]
    hidden = _hidden(B, M, N, mask, query.device)
    lse = query.new_empty((B, H, M), dtype=torch.float32)
    row_sum = query.new_zeros((B, M), dtype=torch.float32)
    for part, queries, keys in _groups(query, key, B * M * N):
        logits = _logits(queries, keys, scale, mask.bias)
        if hidden is not None:
            logits.masked_fill_(hidden[:, None], -torch.inf)
        highest = logits.amax(dim=-1, keepdim=True)
        highest = torch.where(highest == -torch.inf, 0.0, highest)
        weights = logits.sub_(highest).exp_()
        total = weights.sum(dim=-1)
        drawn = total
        if column_weight is not None:
            drawn = torch.matmul(weights, column_weight[:, None, :, None].float())[..., 0]
        row_sum += torch.where(total > 0, drawn / total, 0.0).sum(dim=1)
        lse[:, part] = total.log().add_(highest[..., 0])
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
    B, _, N, d = query.shape
    to_cls, from_cls = query.new_zeros((2, B, N), dtype=torch.float32)
    mean = query.new_zeros((B, N, d) if with_keys else (0,), dtype=torch.float32)
    own_bias = query.new_zeros((B, N), dtype=torch.float32) if bias is None else bias.float()
    for part, queries, keys in _groups(query, key, B * N * d):
        normaliser = lse[:, part]
        absent = normaliser == -torch.inf  # a token without a normaliser is padding
        logits = torch.matmul(queries, keys[:, :, cls_index, :, None])[..., 0].mul_(scale)
        logits.add_(own_bias[:, None, cls_index, None]).sub_(normaliser)
        to_cls += logits.exp_().masked_fill_(absent, 0.0).sum(dim=1)
        logits = torch.matmul(keys, queries[:, :, cls_index, :, None])[..., 0].mul_(scale)
        logits.add_(own_bias[:, None]).sub_(normaliser[:, :, cls_index, None])
        from_cls += logits.exp_().masked_fill_(absent, 0.0).sum(dim=1)
        if with_keys:
            mean += keys.sum(dim=1)
    return to_cls.div_(num_heads), from_cls.div_(num_heads), mean.div_(num_heads)


def _groups(query: Tensor, key: Tensor, head_size: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Groups of heads whose scratch space fits into a cache.

    Args:
        query: (B, H, M, d).
        key: (B, Hk, N, d).
        head_size: fp32 numbers of scratch space that one head takes.

    Yields:
        The heads, their queries (B, g, M, d) fp32 and keys (B, g, N, d) fp32.
    """
    H = query.shape[1]
    repeats = H // key.shape[1]
    step = max(1, _GROUP_BYTES // (4 * max(1, head_size)))
    for start in range(0, H, step):
        part = slice(start, min(start + step, H))
        if repeats == 1:
            keys = key[:, part]
        else:
            keys = key[:, torch.arange(part.start, part.stop, device=key.device) // repeats]
        yield part, query[:, part].float(), keys.float()


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
    if row_index is not None:
        rows = row_index.clamp_min(0).long()
        query, lse = _take(query, rows), lse.gather(2, rows[:, None].expand(-1, lse.shape[1], -1))
    if column_index is not None:
        columns = column_index.clamp_min(0).long()
        key, bias = _take(key, columns), None if bias is None else bias.gather(1, columns)
    B, R, K = query.shape[0], query.shape[2], key.shape[2]
    result = query.new_zeros((B, R, K), dtype=torch.float32)
    for part, queries, keys in _groups(query, key, B * R * K):
        # A query that sees nothing has -inf here and no attention.
        normaliser = torch.where(lse[:, part] == -torch.inf, torch.inf, lse[:, part])
        result += _logits(queries, keys, scale, bias).sub_(normaliser[..., None]).exp_().sum(dim=1)
    return result


def _logits(query: Tensor, key: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Logits scale * q . k + bias of some heads, (B, g, R, K) fp32."""
    logits = torch.matmul(query, key.transpose(-1, -2)).mul_(scale)
    return logits if bias is None else logits.add_(bias[:, None, None].float())


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Rows (B, H, R, d) of (B, H, N, d)."""
    _, H, _, d = values.shape
    return values.gather(2, index[:, None, :, None].expand(-1, H, -1, d))


def _columns(values: Tensor, index: Tensor | None) -> Tensor:
    """Columns (B, T, R) of (B, T, N), zeros where the index is -1."""
    if index is None:
        return values
    spread = index.long()[:, None].expand(-1, values.shape[1], -1)
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
