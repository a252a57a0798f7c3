"""Attention scores against the whole map in float64, and against the vision tower's own."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend
from ficoco_vllm.kernels.attention_scores import reference
from ficoco_vllm.vision.attention import attention_with_lse
from tests.kernels.conftest import DEVICE
from tests.kernels.inputs import CASES, Case, biased, on_device, tolerance


def masks(case: Case) -> list[dict[str, Any]]:
    """Arguments of `softmax_stats` that hide something."""
    B, M, N = case.B, case.M, case.N
    return [
        {},
        {"bias": biased(B, N)},
        {"causal": True},
        {"causal": True, "offset": torch.full((B,), N - M)},
        {"causal": True, "offset": torch.tensor([-3, 7][:B], dtype=torch.int32), "bias": biased(B, N)},
        {"query_length": torch.tensor([M // 2, M][:B])},
    ]


def close(got: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(got.double().cpu(), expected.double(), rtol=atol, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", range(6))
def test_softmax_stats(case: Case, kind: int, backend: Backend) -> None:
    mask = masks(case)[kind]
    query, key = case.heads()
    column_weight = torch.rand((case.B, case.N), generator=torch.Generator().manual_seed(3))
    lse, row_sum = kernels.softmax_stats(
        query.to(DEVICE),
        key.to(DEVICE),
        case.scale,
        column_weight=column_weight.to(DEVICE),
        backend=backend,
        **on_device(mask),
    )
    atol = tolerance(query, key, case.scale, **mask)
    close(lse, reference.log_sum_exp(query, key, case.scale, **mask), atol)
    attention = reference.attention(query, key, case.scale, **mask)
    close(row_sum, (attention * column_weight[:, None]).sum(2), atol)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", range(3))
def test_blocks_and_column_sums(case: Case, kind: int, backend: Backend) -> None:
    mask = masks(case)[kind]
    query, key = case.heads()
    q, k, there = query.to(DEVICE), key.to(DEVICE), on_device(mask)
    atol = tolerance(query, key, case.scale, **mask)
    attention = reference.attention(query, key, case.scale, **mask)
    lse = reference.log_sum_exp(query, key, case.scale, **mask).float().to(DEVICE)
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, case.M, (case.B, 5), generator=generator).sort().values
    columns = torch.randint(0, case.N, (case.B, 19), generator=generator).sort().values
    rows[-1, 3:] = -1
    block = kernels.attention_block(
        q,
        k,
        lse,
        case.scale,
        row_index=rows.to(DEVICE),
        column_index=columns.to(DEVICE),
        backend=backend,
        **there,
    )
    close(block, reference.pick(reference.pick(attention, rows, 1), columns, 2), atol)
    whole = kernels.attention_block(q, k, lse, case.scale, num_heads=2 * case.H, backend=backend, **there)
    close(whole, attention / 2, atol)
    sums = kernels.attention_sums(q, k, lse, case.scale, backend=backend, **there)
    close(sums, attention.sum(1), atol * case.M)  # a sum of M weights has M times their error at most


@pytest.mark.parametrize("case", [replace(case, M=case.N) for case in CASES], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_cls_scores(case: Case, with_bias: bool, backend: Backend) -> None:
    query, key = case.heads()
    bias = biased(case.B, case.N).roll(1, dims=1) if with_bias and case.N > 1 else None
    atol = tolerance(query, key, case.scale, bias=bias)
    attention = reference.attention(query, key, case.scale, bias=bias)
    lse = reference.log_sum_exp(query, key, case.scale, bias=bias).float()
    to_others, from_cls, keys = kernels.cls_scores(
        query.to(DEVICE),
        key.to(DEVICE),
        lse.to(DEVICE),
        case.scale,
        bias=None if bias is None else bias.to(DEVICE),
        with_keys=True,
        backend=backend,
    )
    assert to_others.dtype == torch.float64
    close(to_others, 1.0 - attention[:, :, 0], atol)
    close(from_cls, attention[:, 0], atol)
    close(keys, key.double().mean(1), 2**-20 * max(1.0, case.spread))


@pytest.mark.parametrize("d", [32, 128])
def test_via_text(d: int, backend: Backend) -> None:
    case = Case(B=2, H=2, Hk=2, M=70, N=70, d=d)
    query, key = case.heads()
    attention = reference.attention(query, key, case.scale, causal=True)
    lse = reference.log_sum_exp(query, key, case.scale, causal=True).float()
    text = attention[:, 61:].float()
    source = torch.tensor([[1, 7, 30, 60], [2, 9, 40, 50]])
    target = torch.tensor([[0, 2, 3, 59], [0, 1, 3, 45]])
    result = kernels.attention_block(
        query.to(DEVICE),
        key.to(DEVICE),
        lse.to(DEVICE),
        case.scale,
        row_index=source.to(DEVICE),
        column_index=target.to(DEVICE),
        causal=True,
        text=text.to(DEVICE),
        gamma=0.6,
        backend=backend,
    )
    direct = reference.pick(reference.pick(attention, source, 1), target, 2)
    atol = tolerance(query, key, case.scale, causal=True)
    close(result, reference.via_text(direct, text, source, target, 0.6), atol)


@pytest.mark.parametrize(("R", "K"), [(0, 3), (3, 0), (1, 1)])
def test_empty_blocks(R: int, K: int, backend: Backend) -> None:
    case = Case()
    query, key = (x.to(DEVICE) for x in case.heads())
    lse = torch.zeros((case.B, case.H, case.M), device=DEVICE)
    rows, columns = (torch.zeros((case.B, count), dtype=torch.int64, device=DEVICE) for count in (R, K))
    block = kernels.attention_block(
        query, key, lse, case.scale, row_index=rows, column_index=columns, backend=backend
    )
    assert block.shape == (case.B, R, K)
    assert block.isfinite().all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_as_the_vision_tower_has_it(with_bias: bool, backend: Backend) -> None:
    B, H, N, d = 2, 4, 50, 32
    query, key, value = torch.randn((3, B, H, N, d), generator=torch.Generator().manual_seed(5)).unbind(0)
    bias = torch.rand((B, N), generator=torch.Generator().manual_seed(6)) if with_bias else None
    _, lse = attention_with_lse(query, key, value, 0.2, bias)
    whole = reference.attention(query, key, 0.2, bias=bias)
    there = None if bias is None else bias.to(DEVICE)
    q, k, normalisers = query.to(DEVICE), key.to(DEVICE), lse.to(DEVICE)
    to_others, from_cls, keys = kernels.cls_scores(
        q, k, normalisers, 0.2, bias=there, with_keys=True, backend=backend
    )
    atol = tolerance(query, key, 0.2, bias=bias)
    close(to_others[:, 1:], whole[:, 1:, 1:].sum(-1), atol)
    close(from_cls[:, 1:], whole[:, 0, 1:], atol)
    close(keys[:, 1:], key[:, :, 1:].mean(dim=1), 1e-6)
    index = torch.tensor([[0, 3, 48], [7, 8, 30]])
    rows = kernels.attention_block(
        q, k, normalisers, 0.2, row_index=(index + 1).to(DEVICE), bias=there, backend=backend
    )
    close(rows[:, :, 1:], reference.pick(whole[:, 1:, 1:], index, 1), atol)


def test_what_does_not_fit_is_refused() -> None:
    query, key = Case().heads()
    lse = torch.zeros(query.shape[:3])
    with pytest.raises(ValueError, match="does not fit"):
        kernels.softmax_stats(query, key.half(), 1.0)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.attention_block(query, key[:1], lse, 1.0)
    with pytest.raises(ValueError, match="bias has shape"):
        kernels.softmax_stats(query, key, 1.0, bias=torch.zeros(2, 5))


@pytest.mark.parametrize(("M", "N"), [(37, 37), (65, 33), (16, 130)])
@pytest.mark.parametrize("B", [1, 2])
def test_tiles_of_a_causal_map(M: int, N: int, B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch a tile of rows stops at the last key that it sees; here tiles are a few rows high."""
    case = Case(B=B, M=M, N=N, H=3, Hk=1)
    query, key = case.heads()
    weight = torch.rand((B, N), generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr("ficoco_vllm.kernels.attention_scores.eager._TILE_BYTES", 4 * 5 * B * N)
    shorter = {"causal": True, "query_length": torch.full((B,), M - 3), "bias": biased(B, N)}
    for mask in ({"causal": True}, shorter):
        lse, row_sum = kernels.softmax_stats(
            query, key, case.scale, column_weight=weight, backend="torch", **mask
        )
        atol = tolerance(query, key, case.scale, **mask)
        close(lse, reference.log_sum_exp(query, key, case.scale, **mask), atol)
        attention = reference.attention(query, key, case.scale, **mask)
        close(row_sum, (attention * weight[:, None]).sum(2), atol)
