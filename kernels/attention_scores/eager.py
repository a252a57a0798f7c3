"""Attention scores in torch, without a (B, H, M, N) map.

A single item takes as many heads at a time as fit into a processor's cache. Several items are batched and take one
head at a time: queries and keys are views of one projection, and only within a head do their strides allow a batched
product without a copy. Half-precision inputs are widened as they are used.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ficoco_vllm.kernels.gather import take_head_rows

# Scratch space for the heads of one item that are processed together, and for a tile of a softmax, which is read
# several times.
_HEADS_BYTES = 4 * 2**20
_TILE_BYTES = 2**20


def softmax_stats(
    query: Tensor,
    key: Tensor,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    offset: Tensor | None,
    query_length: Tensor | None,
    column_weight: Tensor | None,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """See `ops.softmax_stats`."""
    B, H, M, _ = query.shape
    N = key.shape[2]
    extra = None if bias is None else bias.float()[:, None]  # added to the logits; broadcasts to (B, M, N)
    hidden = _hidden(query, key, None, None, offset) if causal else None
    if query_length is not None:
        row = torch.arange(M, device=query.device)[None, :, None]
        absent = row >= query_length[:, None, None]
        hidden = absent if hidden is None else absent | hidden
    if hidden is not None:
        extra = torch.where(
            hidden, -torch.inf, torch.zeros((), device=query.device) if extra is None else extra
        )
    lse = query.new_empty((B, H, M), dtype=torch.float32)
    row_sum = query.new_zeros((B, M), dtype=torch.float32)
    weight = None if column_weight is None else column_weight.float()[:, :, None]
    tile = max(1, _TILE_BYTES // (4 * max(1, B * N)))
    for part, queries, keys in _parts(query, key, min(tile, M) * N, _TILE_BYTES):
        for start in range(0, M, tile):
            rows = slice(start, min(start + tile, M))
            # In a causal map these rows see no key after their last one.
            seen = N if not causal or offset is not None else min(N, rows.stop)
            logits = _products(queries[:, :, rows] * scale, keys[:, :, :seen])
            if extra is not None:
                logits.add_((extra[:, rows] if extra.shape[1] > 1 else extra)[:, None, :, :seen])
            highest = logits.amax(dim=-1, keepdim=True)
            highest = torch.where(highest == -torch.inf, 0.0, highest)
            weights = logits.sub_(highest).exp_()
            total = weights.sum(dim=-1)
            weighted = total
            if weight is not None:
                weighted = torch.bmm(weights.flatten(1, 2), weight[:, :seen])[..., 0].view_as(total)
            row_sum[:, rows] += torch.where(total > 0, weighted / total, 0.0).sum(dim=1)
            lse[:, part, rows] = total.log().add_(highest[..., 0])
    return lse, row_sum.div_(num_heads)


def attention_block(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    row_index: Tensor | None,
    column_index: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    text: Tensor | None,
    gamma: float,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_block`."""
    result = _head_sum(query, key, lse, scale, row_index, column_index, bias).div_(num_heads)
    if causal:
        result.masked_fill_(_hidden(query, key, row_index, column_index), 0.0)
    if text is not None:
        source, target = _columns(text, row_index).float(), _columns(text, column_index).float()
        result.baddbmm_(source.transpose(1, 2), target, beta=gamma, alpha=1.0 - gamma)
    return result


def attention_sums(
    query: Tensor, key: Tensor, lse: Tensor, scale: float, bias: Tensor | None, causal: bool, num_heads: int
) -> Tensor:
    """See `ops.attention_sums`."""
    attention = _head_sum(query, key, lse, scale, None, None, bias)
    if causal:
        attention.masked_fill_(_hidden(query, key), 0.0)
    return attention.sum(dim=1).div_(num_heads)


def cls_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    with_keys: bool,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ops.cls_scores`."""
    B, _, N, d = query.shape
    to_cls = from_cls = query.new_zeros((B, N), dtype=torch.float32)
    mean = query.new_zeros((B, N, d) if with_keys else (0,), dtype=torch.float32)
    own_bias = None if bias is None else bias.float()
    for part, queries, keys in _parts(query, key, N * d):
        logits = _products(queries, keys[:, :, :1] * scale, -lse[:, part, :, None])[..., 0]
        if own_bias is not None:
            logits.add_(own_bias[:, None, :1])
        to_cls = to_cls + logits.exp_().sum(dim=1)
        logits = _products(keys, queries[:, :, :1] * scale, -lse[:, part, :1, None])[..., 0]
        if own_bias is not None:
            logits.add_(own_bias[:, None])
        from_cls = from_cls + logits.exp_().sum(dim=1)
        if with_keys:
            mean += keys.sum(dim=1)
    to_others = 1.0 - to_cls.div_(num_heads).double()
    return to_others, from_cls.div_(num_heads), mean.div_(num_heads)


def _parts(
    query: Tensor, key: Tensor, head_size: int, num_bytes: int = _HEADS_BYTES
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Heads that are processed together.

    Args:
        query: (B, H, M, d).
        key: (B, Hk, N, d).
        head_size: fp32 numbers of scratch space for one head of one item.
        num_bytes: scratch space for heads that are processed together.

    Yields:
        The heads, their queries (B, g, M, d) fp32 and keys (B, g, N, d) fp32.
    """
    B, H = query.shape[:2]
    repeats = H // key.shape[1]
    step = max(1, num_bytes // (4 * max(1, B * head_size))) if B == 1 else 1
    for start in range(0, H, step):
        part = slice(start, min(start + step, H))
        if repeats == 1:
            keys = key[:, part]
        elif step == 1:
            keys = key[:, start // repeats, None]
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
    if row_index is None:
        absent = lse == -torch.inf
    else:
        rows = row_index.clamp_min(0).long()
        query, lse = take_head_rows(query, rows), lse.gather(2, rows[:, None].expand(-1, lse.shape[1], -1))
        absent = (lse == -torch.inf) | (row_index < 0)[:, None]
    columns = None if column_index is None else column_index.long()
    # For most of the columns computing all is cheaper than copying keys; for a few the keys are copied.
    cut = columns is not None and 2 * columns.shape[1] > key.shape[2]
    if columns is not None and not cut:
        key, bias = take_head_rows(key, columns), None if bias is None else bias.gather(1, columns)
    B, R, K = query.shape[0], query.shape[2], key.shape[2]
    result = query.new_zeros((B, R, K), dtype=torch.float32)
    negative = torch.where(absent, -torch.inf, -lse)[..., None]  # a query that sees nothing has no attention
    for part, queries, keys in _parts(query, key, R * K):
        logits = _products(queries * scale, keys, negative[:, part])
        if bias is not None:
            logits.add_(bias[:, None, None].float())
        result += logits.exp_().sum(dim=1)
    if cut:
        assert columns is not None
        result = result.gather(2, columns[:, None].expand(-1, R, -1))
    return result


def _products(query: Tensor, key: Tensor, start: Tensor | None = None) -> Tensor:
    """Products q . k of the heads of one item or of one head of several items, plus `start`.

    Args:
        query: (B, g, R, d) fp32, B or g 1, so that one batched product takes any strides of the other.
        key: (B, g, K, d) fp32.
        start: (B, g, R, 1) fp32.

    Returns:
        (B, g, R, K) fp32.
    """
    B, g = query.shape[:2]
    left, right = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    shape = (left.shape[1], right.shape[2])
    if start is None:
        return torch.bmm(left, right).view(B, g, *shape)
    return torch.baddbmm(start.flatten(0, 1), left, right).view(B, g, *shape)


def _columns(values: Tensor, index: Tensor | None) -> Tensor:
    """Columns (B, T, R) of (B, T, N), zeros where the index is -1."""
    if index is None:
        return values
    spread = index.long()[:, None].expand(-1, values.shape[1], -1)
    return values.gather(2, spread.clamp_min(0)).masked_fill_(spread < 0, 0.0)


def _hidden(
    query: Tensor,
    key: Tensor,
    row_index: Tensor | None = None,
    column_index: Tensor | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Pairs that a causal map hides, broadcastable to (B, R, K) bool."""
    device = query.device
    row = torch.arange(query.shape[2], device=device)[None] if row_index is None else row_index
    column = torch.arange(key.shape[2], device=device)[None] if column_index is None else column_index
    last = row if offset is None else row + offset[:, None]
    return column[:, None, :] > last[:, :, None]
