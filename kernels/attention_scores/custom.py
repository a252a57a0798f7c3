"""The Triton launchers as custom ops, so that `torch.compile` and CUDA graphs take them as they are.

The launchers are imported inside the ops: a machine without Triton can import this module.
"""

import torch
from torch import Tensor


@torch.library.custom_op("ficoco::softmax_stats", mutates_args=())
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
    from ficoco_vllm.kernels.attention_scores import triton_stats

    return triton_stats.softmax_stats(
        query, key, scale, bias, causal, offset, query_length, column_weight, num_heads
    )


@softmax_stats.register_fake
def _(query, key, *_rest):  # type: ignore[no-untyped-def]
    B, H, M, _d = query.shape
    return query.new_empty((B, H, M), dtype=torch.float32), query.new_empty((B, M), dtype=torch.float32)


@torch.library.custom_op("ficoco::attention_block", mutates_args=())
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
    from ficoco_vllm.kernels.attention_scores import triton_block

    return triton_block.attention_block(
        query, key, lse, scale, row_index, column_index, bias, causal, text, gamma, num_heads
    )


@attention_block.register_fake
def _(query, key, lse, scale, row_index, column_index, *_rest):  # type: ignore[no-untyped-def]
    R = query.shape[2] if row_index is None else row_index.shape[1]
    K = key.shape[2] if column_index is None else column_index.shape[1]
    return query.new_empty((query.shape[0], R, K), dtype=torch.float32)


@torch.library.custom_op("ficoco::attention_sums", mutates_args=())
def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    bias: Tensor | None,
    causal: bool,
    num_heads: int,
) -> Tensor:
    """See `ops.attention_sums`."""
    from ficoco_vllm.kernels.attention_scores import triton_sums

    return triton_sums.attention_sums(query, key, lse, scale, bias, causal, num_heads)


@attention_sums.register_fake
def _(query, key, *_rest):  # type: ignore[no-untyped-def]
    return query.new_empty((query.shape[0], key.shape[2]), dtype=torch.float32)


@torch.library.custom_op("ficoco::cls_scores", mutates_args=())
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
    from ficoco_vllm.kernels.attention_scores import triton_cls

    return triton_cls.cls_scores(query, key, lse, scale, bias, with_keys, num_heads)


@cls_scores.register_fake
def _(query, key, lse, scale, bias, with_keys, num_heads):  # type: ignore[no-untyped-def]
    B, _, N, d = query.shape
    to_others, from_cls = (query.new_empty((B, N), dtype=dtype) for dtype in (torch.float64, torch.float32))
    keys = query.new_empty((B, N, d) if with_keys else (0,), dtype=torch.float32)
    return to_others, from_cls, keys
