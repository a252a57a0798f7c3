"""The doors to the attention scores: each checks its arguments and chooses the implementation."""

from torch import Tensor

from ficoco_vllm.kernels.attention_scores import custom, eager
from ficoco_vllm.kernels.attention_scores.mask import Mask
from ficoco_vllm.kernels.backend import Backend, uses_triton


def softmax_stats(
    query: Tensor,
    key: Tensor,
    scale: float,
    *,
    mask: Mask = Mask(),  # noqa: B008  (an immutable tuple)
    column_weight: Tensor | None = None,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalisers of the attention, and how much each query draws from chosen keys, in one pass.

    lse_hi = log sum_j exp(logit_hij);  row_sum_i = 1/H sum_h sum_j weight_j A_hij.

    Args:
        query: (B, H, M, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H (grouped queries).
        scale: factor of the products.
        mask: which keys a query sees.
        column_weight: (B, N) any floating dtype, how much each key counts in `row_sum`: 1 for the visual
            tokens, 0 for others. None counts all.
        num_heads: what the sum over the heads given is divided by; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        lse (B, H, M) fp32, -inf for a query that sees nothing; row_sum (B, M) fp32, 0 for such a query.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 2, 11 and 14.
    """
    heads = _checked(query, key, mask, num_heads)
    if not uses_triton(backend, query):
        return eager.softmax_stats(query, key, scale, mask, column_weight, heads)
    found: tuple[Tensor, Tensor] = custom.softmax_stats(query, key, scale, *mask, column_weight, heads)
    return found


def attention_block(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    row_index: Tensor | None = None,
    column_index: Tensor | None = None,
    mask: Mask = Mask(),  # noqa: B008
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
        lse: (B, H, M) fp32 normalisers of the attention that ran, over all keys that it saw.
        scale: factor of the products.
        row_index: (B, R) int32 or int64 into the M queries, -1 where an item has fewer rows; None means all.
        column_index: (B, K) int32 or int64 into the N keys, -1 likewise; None means all.
        mask: as in the attention that ran.
        text: (B, T, N) attention that each text token gives, in the numbering of the keys (and of the
            queries, which must then be the same tokens); None leaves the second term out.
        gamma: weight of the direct term where `text` is given.
        num_heads: what the sum over the heads given is divided by; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, R, K) fp32, 0 where an index is -1 or (the direct term) the query does not see the key.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 12 and 15.
    """
    heads = _checked(query, key, mask, num_heads)
    if not uses_triton(backend, query):
        return eager.attention_block(
            query, key, lse, scale, row_index, column_index, mask, text, gamma, heads
        )
    found: Tensor = custom.attention_block(
        query, key, lse, scale, row_index, column_index, *mask, text, gamma, heads
    )
    return found


def attention_sums(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    axis: int,
    weight: Tensor | None = None,
    mask: Mask = Mask(),  # noqa: B008
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Row sums (what each query draws) or column sums (what each key receives) of the head-mean attention.

    Args:
        query: (B, H, M, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H.
        lse: (B, H, M) fp32 normalisers of the attention that ran.
        scale: factor of the products.
        axis: what is summed over: 2, the keys, or 1, the queries.
        weight: (B, N) for axis 2, (B, M) for axis 1, any floating dtype: how much each summand counts; None
            counts all.
        mask: as in the attention that ran.
        num_heads: what the sum over the heads given is divided by; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        (B, M) fp32 for axis 2, (B, N) fp32 for axis 1.

    Raises:
        ValueError: shapes do not fit, or `axis` is neither 1 nor 2.

    Source: arXiv:2411.17686, Eqs. 5, 11 and 14.
    """
    heads = _checked(query, key, mask, num_heads)
    if axis not in (1, 2):
        raise ValueError(f"axis = {axis} is not allowed; allowed: 1 (over the queries), 2 (over the keys)")
    if not uses_triton(backend, query):
        return eager.attention_sums(query, key, lse, scale, axis, weight, mask, heads)
    found: Tensor = custom.attention_sums(query, key, lse, scale, axis, weight, *mask, heads)
    return found


def cls_scores(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    *,
    cls_index: int = 0,
    bias: Tensor | None = None,
    with_keys: bool = False,
    num_heads: int | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each token to [CLS], of [CLS] to each token, and head-mean keys, in one pass.

    Where [CLS] is the only token that is no patch, what a patch draws from the patches is one minus what it
    gives to [CLS]: Eq. 11 needs no map at all.

    Args:
        query: (B, H, N, d), fp16, bf16 or fp32, any strides, d up to 128.
        key: (B, Hk, N, d), the dtype of `query`; Hk divides H.
        lse: (B, H, N) fp32 normalisers of the attention that ran; -inf marks padding.
        scale: factor of the products.
        cls_index: which token is [CLS].
        bias: (B, N) any floating dtype, added to the logits of each key, or None.
        with_keys: whether the keys are asked for.
        num_heads: what the sum over the heads given is divided by; None divides by their number.
        backend: see `ficoco_vllm.kernels.backend`.

    Returns:
        to_cls (B, N) fp32; from_cls (B, N) fp32; keys (B, N, d) fp32, or an empty tensor. All still hold
        the entry of [CLS] itself.

    Raises:
        ValueError: shapes do not fit.

    Source: arXiv:2411.17686, Eqs. 4, 6 and 11.
    """
    heads = _checked(query, key, Mask(bias), num_heads)
    if not 0 <= cls_index < query.shape[2]:
        raise ValueError(f"cls_index = {cls_index} is not allowed; allowed: 0 to {query.shape[2] - 1}")
    if not uses_triton(backend, query):
        return eager.cls_scores(query, key, lse, scale, cls_index, bias, with_keys, heads)
    found: tuple[Tensor, Tensor, Tensor] = custom.cls_scores(
        query, key, lse, scale, cls_index, bias, with_keys, heads
    )
    return found


def _checked(query: Tensor, key: Tensor, mask: Mask, num_heads: int | None) -> int:
    """The divisor of the head mean, after a look at the shapes."""
    B, H, _, d = query.shape
    if (
        key.shape[0] != B
        or key.shape[3] != d
        or key.shape[1] == 0
        or H % key.shape[1]
        or key.dtype != query.dtype
    ):
        raise ValueError(
            f"key {tuple(key.shape)} of {key.dtype} does not fit query {tuple(query.shape)} of {query.dtype}"
        )
    if mask.bias is not None and mask.bias.shape != (B, key.shape[2]):
        raise ValueError(f"bias has shape {tuple(mask.bias.shape)}; needed: {(B, key.shape[2])}")
    return H if num_heads is None else num_heads
