"""Attention scores against the whole map in float64, and against the vision tower's own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ficoco_vllm import kernels
from ficoco_vllm.kernels import Backend, Mask
from ficoco_vllm.kernels.attention_scores import reference
from ficoco_vllm.vision.attention import attention_with_lse
from tests.kernels.conftest import DEVICE
from tests.kernels.inputs import CASES, Case, on_device, tolerance, with_bias


def masks(case: Case) -> list[Mask]:
    B, M, N = case.B, case.M, case.N
    lengths = torch.tensor([max(1, N - 5), N][:B])
    return [
        Mask(),
        with_bias(Mask(), B, N),
        Mask(causal=True, offset=torch.full((B,), N - M)),
        Mask(causal=True, offset=torch.tensor([-3, 7][:B], dtype=torch.int32), key_length=lengths),
        Mask(query_length=torch.tensor([M // 2, M][:B]), key_length=lengths),
    ]


def close(found: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(found.double().cpu(), expected.double(), rtol=atol, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", range(5))
def test_all_outputs(case: Case, kind: int, backend: Backend) -> None:
    mask = masks(case)[kind]
    query, key = case.heads()
    there = on_device(mask)
    q, k = query.to(DEVICE), key.to(DEVICE)
    atol = tolerance(query, key, case.scale, mask)
    attention = reference.attention(query, key, case.scale, mask)
    generator = torch.Generator().manual_seed(3)
    column_weight = torch.rand((case.B, case.N), generator=generator)
    row_weight = torch.rand((case.B, case.M), generator=generator)

    lse, drawn = kernels.softmax_stats(
        q, k, case.scale, mask=there, column_weight=column_weight.to(DEVICE), backend=backend
    )
    close(lse, reference.log_sum_exp(query, key, case.scale, mask), atol)
    close(drawn, (attention * column_weight[:, None]).sum(2), atol)

    true_lse = reference.log_sum_exp(query, key, case.scale, mask).float().to(DEVICE)
    rows = torch.randint(0, case.M, (case.B, 5), generator=generator).sort().values
    columns = torch.randint(0, case.N, (case.B, 19), generator=generator).sort().values
    rows[-1, 3:], columns[-1, 11:] = -1, -1
    block = kernels.attention_block(
        q,
        k,
        true_lse,
        case.scale,
        row_index=rows.to(DEVICE),
        column_index=columns.to(DEVICE),
        mask=there,
        backend=backend,
    )
    close(block, reference.pick(reference.pick(attention, rows, 1), columns, 2), atol)
    whole = kernels.attention_block(
        q, k, true_lse, case.scale, mask=there, num_heads=2 * case.H, backend=backend
    )
    close(whole, attention / 2, atol)

    # A sum of M weights has M times their error at most.
    for axis, weight in ((2, column_weight), (1, row_weight)):
        sums = kernels.attention_sums(
            q, k, true_lse, case.scale, axis=axis, weight=weight.to(DEVICE), mask=there, backend=backend
        )
        spread = weight[:, None, :] if axis == 2 else weight[:, :, None]
        close(sums, (attention * spread).sum(axis), atol * (1 if axis == 2 else case.M))
    received = kernels.attention_sums(q, k, true_lse, case.scale, axis=1, mask=there, backend=backend)
    close(received, attention.sum(1), atol * case.M)


@pytest.mark.parametrize("case", [replace(case, M=case.N) for case in CASES], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_cls_scores(case: Case, biased: bool, backend: Backend) -> None:
    query, key = case.heads()
    cls_index = min(1, case.N - 1)
    mask = with_bias(Mask(), case.B, case.N) if biased and case.N > 1 else Mask()
    atol = tolerance(query, key, case.scale, mask)
    attention = reference.attention(query, key, case.scale, mask)
    lse = reference.log_sum_exp(query, key, case.scale, mask).float()
    to_cls, from_cls, keys = kernels.cls_scores(
        query.to(DEVICE),
        key.to(DEVICE),
        lse.to(DEVICE),
        case.scale,
        cls_index=cls_index,
        bias=None if mask.bias is None else mask.bias.to(DEVICE),
        with_keys=True,
        backend=backend,
    )
    close(to_cls, attention[:, :, cls_index], atol)
    close(from_cls, attention[:, cls_index], atol)
    close(keys, key.double().mean(1), 2**-20 * max(1.0, case.spread))


def test_padded_items_give_and_draw_nothing(backend: Backend) -> None:
    case = Case()
    query, key = case.heads()
    length = torch.tensor([20, case.N])
    mask = on_device(Mask(query_length=length, key_length=length))
    lse, _ = kernels.softmax_stats(query.to(DEVICE), key.to(DEVICE), case.scale, mask=mask, backend=backend)
    to_cls, from_cls, _ = kernels.cls_scores(
        query.to(DEVICE), key.to(DEVICE), lse, case.scale, backend=backend
    )
    assert (to_cls[0, 20:] == 0).all()
    assert (from_cls[0, 20:] == 0).all()
    alone = reference.attention(query[:1, :, :20], key[:1, :, :20], case.scale, Mask())
    close(to_cls[:1, :20], alone[:, :, 0], 1e-5)
    close(from_cls[:1, :20], alone[:, 0], 1e-5)


@pytest.mark.parametrize("d", [32, 128])
def test_via_text(d: int, backend: Backend) -> None:
    case = Case(B=2, H=2, Hk=2, M=70, N=70, d=d)
    query, key = case.heads()
    mask = Mask(causal=True)
    attention = reference.attention(query, key, case.scale, mask)
    lse = reference.log_sum_exp(query, key, case.scale, mask).float()
    text = attention[:, 61:].float()
    source = torch.tensor([[1, 7, 30, 60], [2, 9, -1, -1]])
    target = torch.tensor([[0, 2, 3, 59], [0, 1, 3, -1]])
    found = kernels.attention_block(
        query.to(DEVICE),
        key.to(DEVICE),
        lse.to(DEVICE),
        case.scale,
        row_index=source.to(DEVICE),
        column_index=target.to(DEVICE),
        mask=mask,
        text=text.to(DEVICE),
        gamma=0.6,
        backend=backend,
    )
    direct = reference.pick(reference.pick(attention, source, 1), target, 2)
    close(
        found, reference.via_text(direct, text, source, target, 0.6), tolerance(query, key, case.scale, mask)
    )


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


@pytest.mark.parametrize("biased", [False, True])
def test_as_the_vision_tower_has_it(biased: bool, backend: Backend) -> None:
    B, H, N, d = 2, 4, 50, 32
    query, key, value = torch.randn((3, B, H, N, d), generator=torch.Generator().manual_seed(5)).unbind(0)
    bias = torch.rand((B, N), generator=torch.Generator().manual_seed(6)) if biased else None
    _, lse = attention_with_lse(query, key, value, 0.2, bias)
    whole = reference.attention(query, key, 0.2, Mask(bias))
    there = None if bias is None else bias.to(DEVICE)
    q, k, normalisers = query.to(DEVICE), key.to(DEVICE), lse.to(DEVICE)
    to_cls, from_cls, keys = kernels.cls_scores(
        q, k, normalisers, 0.2, bias=there, with_keys=True, backend=backend
    )
    atol = tolerance(query, key, 0.2, Mask(bias))
    close(1.0 - to_cls[:, 1:], whole[:, 1:, 1:].sum(-1), atol)
    close(from_cls[:, 1:], whole[:, 0, 1:], atol)
    close(keys[:, 1:], key[:, :, 1:].mean(dim=1), 1e-6)
    index = torch.tensor([[0, 3, 48], [7, 8, 30]])
    rows = kernels.attention_block(
        q, k, normalisers, 0.2, row_index=(index + 1).to(DEVICE), mask=Mask(there), backend=backend
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
        kernels.softmax_stats(query, key, 1.0, mask=Mask(torch.zeros(2, 5)))
    with pytest.raises(ValueError, match="axis = 0"):
        kernels.attention_sums(query, key, lse, 1.0, axis=0)
    with pytest.raises(ValueError, match="cls_index = 37"):
        kernels.cls_scores(query, key, lse, 1.0, cls_index=37)


@pytest.mark.parametrize(("M", "N"), [(37, 37), (65, 33), (16, 130)])
@pytest.mark.parametrize("B", [1, 2])
def test_tiles_of_a_causal_map(M: int, N: int, B: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In torch a tile of rows stops at the last key that it sees; here tiles are a few rows high."""
    case = Case(B=B, M=M, N=N, H=3, Hk=1)
    query, key = case.heads()
    weight = torch.rand((B, N), generator=torch.Generator().manual_seed(7))
    monkeypatch.setattr("ficoco_vllm.kernels.attention_scores.eager._TILE_BYTES", 4 * 5 * B * N)
    for mask in (Mask(causal=True), with_bias(Mask(causal=True, query_length=torch.full((B,), M - 3)), B, N)):
        lse, drawn = kernels.softmax_stats(
            query, key, case.scale, mask=mask, column_weight=weight, backend="torch"
        )
        atol = tolerance(query, key, case.scale, mask)
        close(lse, reference.log_sum_exp(query, key, case.scale, mask), atol)
        attention = reference.attention(query, key, case.scale, mask)
        close(drawn, (attention * weight[:, None]).sum(2), atol)
