"""Public entry points of the attention scores: they validate arguments and dispatch to torch or Triton."""

from torch import Tensor

from ficoco_vllm.kernels.attention_scores import custom, eager
from ficoco_vllm.kernels.backend import Backend, uses_triton


def softmax_stats(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    offset: Tensor | None = None,
    query_length: Tensor | None = None,
    column_weight: Tensor | None = None,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalisers of the attention, and row sums over weighted keys, in one pass.

    lse_hi = log sum_j exp(logit_hij);  row_sum_i = 1/H sum_h sum_j weight_j A_hij.

    Args:
        query: (B, H, M, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H (grouped queries).
        scale: factor of the products.
        bias: (B, N) any floating dtype, added to the scaled logits of each key; -inf hides it.
        causal: whether query i sees only the keys j <= i + offset.
        offset: (B,) int32 or int64, position of each item's first query among its keys; None means 0.
        query_length: (B,) int32 or int64, how many queries of each item count; None means all.
        column_weight: (B, N) any floating dtype, weight of each key in `row_sum`: 1 for the visual tokens, 0 for
            others. None counts all.
        num_heads: divisor of the sum over the given heads; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        lse (B, H, M) fp32, -inf for a query that sees nothing; row_sum (B, M) fp32, 0 for such a query.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 2, 11 and 14.
    """
    heads = _checked(query, key, bias, num_heads)
    arguments = (query, key, scale, bias, causal, offset, query_length, column_weight, heads)
    if not uses_triton(backend, query):
        return eager.softmax_stats(*arguments)
    stats: tuple[Tensor, Tensor] = custom.softmax_stats(*arguments)
    return stats


def attention_block(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    row_index: Tensor | None = None,
    column_index: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    text: Tensor | None = None,
    gamma: float = 1.0,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Head-mean attention of chosen queries to chosen keys, and Eq. 15 where `text` is given.

    A_ij = 1/H sum_h exp(scale q_hi . k_hj + bias_j - lse_hi);
    C_ij = gamma A_ij + (1 - gamma) sum_t text_ti text_tj.

    Args:
        query: (B, H, M, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H.
        lse: (B, H, M) fp32 normalisers of the layer's attention, over all keys that it saw.
        scale: factor of the products.
        row_index: (B, R) int32 or int64 into the M queries, -1 where an item has fewer rows; None means all.
        column_index: (B, K) int32 or int64 into the N keys; None means all.
        bias: (B, N) any floating dtype, added to the logits of each key, or None.
        causal: whether query i sees only the keys j <= i.
        text: (B, T, N) attention of each text token, in the numbering of the keys (and of the queries, which must then
            be the same tokens); None omits the second term.
        gamma: weight of the direct term where `text` is given.
        num_heads: divisor of the sum over the given heads; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, R, K) fp32, 0 where a row is -1 or (the direct term) the query does not see the key.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 12 and 15.
    """
    heads = _checked(query, key, bias, num_heads)
    arguments = (query, key, lse, scale, row_index, column_index, bias, causal, text, gamma, heads)
    if not uses_triton(backend, query):
        return eager.attention_block(*arguments)
    block: Tensor = custom.attention_block(*arguments)
    return block


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    causal: bool = False,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Column sums of the head-mean attention: the attention that each key receives from all queries.

    Args:
        query: (B, H, M, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H.
        lse: (B, H, M) fp32 normalisers of the layer's attention.
        scale: factor of the products.
        bias: (B, N) any floating dtype, added to the logits of each key, or None.
        causal: whether query i sees only the keys j <= i.
        num_heads: divisor of the sum over the given heads; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, N) fp32.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eq. 5.
    """
    heads = _checked(query, key, bias, num_heads)
    arguments = (query, key, lse, scale, bias, causal, heads)
    if not uses_triton(backend, query):
        return eager.attention_sums(*arguments)
    sums: Tensor = custom.attention_sums(*arguments)
    return sums


def cls_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    bias: Tensor | None = None,
    with_keys: bool = False,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each token to all but [CLS], of [CLS] to each token, and head-mean keys, in one pass.

    [CLS] is token 0. Where it is the only token that is not a patch, the first of these is the row sum of a patch over
    the patches: Eq. 11 needs no map at all.

    Args:
        query: (B, H, N, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H.
        lse: (B, H, N) fp32 normalisers of the layer's attention.
        scale: factor of the products.
        bias: (B, N) any floating dtype, added to the logits of each key, or None.
        with_keys: whether the head-mean keys are computed.
        num_heads: divisor of the sum over the given heads; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        to_others (B, N) fp64, one minus the head-mean attention to [CLS]: close to 1 fp32 rounds away the differences
        between tokens; from_cls (B, N) fp32; keys (B, N, d) fp32, or an empty tensor. All include the entry of
        [CLS] itself.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 4, 6 and 11.
    """
    heads = _checked(query, key, bias, num_heads)
    arguments = (query, key, lse, scale, bias, with_keys, heads)
    if not uses_triton(backend, query):
        return eager.cls_scores(*arguments)
    scores: tuple[Tensor, Tensor, Tensor] = custom.cls_scores(*arguments)
    return scores


def _checked(query: Tensor, key: Tensor, bias: Tensor | None, num_heads: int | None) -> int:
    """Check the shapes and return the divisor of the head mean."""
    B, H, _, d = query.shape
    Hk, N = key.shape[1:3]
    if key.shape != (B, Hk, N, d) or Hk == 0 or H % Hk or key.dtype != query.dtype:
        raise ValueError(
            f"key {tuple(key.shape)} of {key.dtype} does not fit query {tuple(query.shape)} of {query.dtype}"
        )
    if bias is not None and bias.shape != (B, N):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; needed: {(B, N)}")
    return H if num_heads is None else num_heads
