"""The fused ops on half-precision inputs that are hard, against float64 on the same rounded inputs.

What is proven: beyond the rounding of their inputs, and of the merged tokens, the ops add single-precision error only.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.attention_scores import reference
from ficoco_vllm.kernels.quantile_merge import reference as merging
from tests.kernels.conftest import DEVICE
from tests.kernels.inputs import tolerance

HALVES = (torch.bfloat16, torch.float16)
B, H, N, d = 2, 2, 65, 64
SCALE = d**-0.5


def large_norms(query: Tensor, key: Tensor) -> None:
    """Logits of several hundred, as of outlier channels."""
    query[..., 5] *= 60
    key[..., 5] *= 40


def sink(query: Tensor, key: Tensor) -> None:
    """Every query gives all but a hundred-thousandth of its weight to [CLS]."""
    query[..., 0], key[..., 0] = 8.0, 0.0
    key[:, :, 0] = 0.0
    key[:, :, 0, 0] = 12.0 / (8.0 * SCALE)


def near_ties(query: Tensor, key: Tensor) -> None:
    """All keys are equal up to the last place of a half."""
    key[:] = key[:, :, :1]
    key[:, :, ::3] *= 1 + 2**-7


Hardship = Callable[[Tensor, Tensor], None]


def heads(dtype: torch.dtype, hard: Hardship) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, d), rounded to a half."""
    generator = torch.Generator().manual_seed(5)
    query, key = torch.randn((2, B, H, N, d), generator=generator)
    hard(query, key)
    return query.to(dtype), key.to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("hard", [large_norms, sink, near_ties])
def test_scores(dtype: torch.dtype, hard: Hardship, backend: Backend) -> None:
    """Normalisers, rows and columns of [CLS], and a block, each within the error of single precision."""
    query, key = heads(dtype, hard)
    q, k = query.to(DEVICE), key.to(DEVICE)
    atol = tolerance(query, key, SCALE)
    expected = reference.attention(query, key, SCALE)
    lse, _ = kernels.softmax_stats(q, k, SCALE, backend=backend)
    exact = reference.log_sum_exp(query, key, SCALE)
    torch.testing.assert_close(lse.double().cpu(), exact, rtol=2**-21, atol=atol)
    to_others, from_cls, keys = kernels.cls_scores(q, k, lse, SCALE, with_keys=True, backend=backend)
    torch.testing.assert_close(to_others.cpu(), 1.0 - expected[:, :, 0], rtol=0, atol=2 * atol)
    torch.testing.assert_close(from_cls.double().cpu(), expected[:, 0], rtol=0, atol=2 * atol)
    # A sum of H halves in single precision.
    torch.testing.assert_close(keys.double().cpu(), key.double().mean(1), rtol=2**-22, atol=2**-22)
    index = torch.arange(0, N, 4).expand(B, -1).to(DEVICE)
    block = kernels.attention_block(q, k, lse, SCALE, row_index=index, column_index=index, backend=backend)
    torch.testing.assert_close(block.double().cpu(), expected[:, ::4, ::4], rtol=0, atol=2 * atol)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_sink_leaves_the_others_their_order(dtype: torch.dtype, backend: Backend) -> None:
    """Row sums of Eq. 11 near zero, since [CLS] takes all: the tokens that leave are those of float64."""
    query, key = heads(dtype, sink)
    q, k = query.to(DEVICE), key.to(DEVICE)
    lse, _ = kernels.softmax_stats(q, k, SCALE, backend=backend)
    to_others, from_cls, _ = kernels.cls_scores(q, k, lse, SCALE, backend=backend)
    position = torch.arange(N - 1, device=DEVICE).expand(B, -1)
    scores = kernels.filter_scores(
        to_others[:, 1:],
        from_cls[:, 1:],
        0.35,
        position=position,
        grid=(8, 8),
        backend=backend,
    )
    source, _ = kernels.partition(scores, 48, backend=backend)
    expected = reference.attention(query, key, SCALE)
    exact = kernels.filter_scores(
        1.0 - expected[:, 1:, 0],
        expected[:, 0, 1:],
        0.35,
        position=position.cpu(),
        grid=(8, 8),
        backend="torch",
    )
    right, _ = kernels.partition(exact, 48, backend="torch")
    assert torch.equal(source.cpu(), right)


@pytest.mark.parametrize("gap", [0.0, 2**-51, 2**-24])
def test_scores_that_nearly_tie_are_told_apart(gap: float, backend: Backend) -> None:
    """fp64 scores whose difference fp32 does not hold; equal ones leave in the order of their index."""
    scores = (1.0 + gap * torch.arange(N, dtype=torch.float64).remainder(7)).expand(B, N).contiguous()
    source, target = kernels.partition(scores.to(DEVICE), 40, backend=backend)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    assert torch.equal(source.cpu(), order[:, :40].sort().values)
    assert torch.equal(target.cpu(), order[:, 40:].sort().values)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e37), (torch.float16, 6e-8)]
)
def test_merge_at_the_ends_of_a_half(dtype: torch.dtype, size: float, backend: Backend) -> None:
    """A mean of large tokens overflows nowhere, and one of the smallest does not vanish.

    Sums are single precision: bfloat16, which has its range, is tried at a size that leaves room for a sum.
    """
    generator = torch.Generator().manual_seed(6)
    R, K, D = 40, 24, 48
    tokens = (torch.rand((B, R + K, D), generator=generator) * 0.1 + 0.9).mul(size).to(dtype)
    tokens[:, ::2] *= -1
    correlation = torch.rand((B, R, K), generator=generator)
    order = torch.stack([torch.randperm(R + K, generator=generator) for _ in range(B)])
    source, target = order[:, :R].sort().values, order[:, R:].sort().values
    ones = torch.ones(B, R + K)
    parts = (tokens, ones, correlation, source, target)
    merged, _ = kernels.quantile_merge(*(part.to(DEVICE) for part in parts), epsilon=0.8, backend=backend)
    expected, _ = merging.quantile_merge(*parts, 0.8, None, False)
    assert merged.isfinite().all()
    # One rounding to the half, of a normal number or of one below them.
    step = torch.finfo(dtype).eps
    error = (merged.double().cpu() - expected).abs()
    assert (error <= expected.abs() * step + size * 2**-18 + torch.finfo(dtype).smallest_normal * step).all()
