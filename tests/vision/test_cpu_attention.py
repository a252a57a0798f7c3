"""How exact the attention of CPUs is, and where it is taken."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ficoco_vllm.vision.attention import ClipHeads
from ficoco_vllm.vision.cpu_attention import (
    HeadSums,
    attention_rows,
    centred_attention,
    centred_keys,
    is_faster,
)


def heads(images: int, tokens: int, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that share an offset, as a trained model's do, and values, laid out as vLLM's tower has them."""
    torch.manual_seed(0)
    qkv = torch.randn(images, tokens, 3, 4, 64)
    qkv[:, :, 1] += offset * torch.randn(4, 64)
    query, key, value = qkv.bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0])
@pytest.mark.parametrize(("images", "tokens"), [(1, 577), (3, 50), (2, 1), (2, 1100)])
def test_about_as_exact_as_the_fused_kernel(images: int, tokens: int, offset: float) -> None:
    query, key, value = heads(images, tokens, offset)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.125)
    fused = error(scaled_dot_product_attention(query, key, value, scale=0.125), exact)
    result = error(centred_attention(query, centred_keys(key, 0.125), value).transpose(1, 2), exact)
    # Rounded logits and rounded keys add two errors of the size of bfloat16's step, 2^-8, to the rounded weights
    # and outputs that both have.
    assert result <= fused + 2**-8


def test_the_offset_of_the_keys_costs_nothing() -> None:
    """Were the keys not centred, their offset would make the logits, and what is rounded of them, larger."""
    errors = []
    for offset in (0.0, 10.0):
        query, key, value = heads(1, 577, offset)
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.125)
        errors.append(error(centred_attention(query, centred_keys(key, 0.125), value).transpose(1, 2), exact))
    plain = torch.softmax(query @ key.transpose(2, 3) * 0.125, dim=-1) @ value
    assert error(plain, exact) > 3 * errors[1]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(("images", "tokens"), [(1, 577), (3, 50), (2, 2), (2, 1100)])
def test_signals_that_need_no_normalisers(images: int, tokens: int, offset: float, has_cls: bool) -> None:
    """What methods read of the map, against the map in float64."""
    query, key, value = heads(images, tokens, offset)
    exact = torch.softmax(query.double() @ key.double().transpose(2, 3) * 0.125, dim=-1).mean(dim=1)
    zeros = torch.zeros(2, images, tokens)
    keys = centred_keys(key, 0.125)
    sums = HeadSums(keys, first=zeros) if has_cls else HeadSums(keys, received=zeros[0])
    mixed = centred_attention(query, keys, value, sums)
    assert torch.equal(mixed, centred_attention(query, keys, value))
    measured = ClipHeads(query, key, None, 0.125, None, 4, has_cls=has_cls, given_sums=sums)
    attention = measured.visual_attention()
    patches = exact[:, has_cls:, has_cls:]
    if has_cls:
        # Single weights, of four heads: rounding them is a relative error of half a step of bfloat16, 2^-9; rounding
        # their logits, which are up to six here, one of up to 2^-6.
        close = {"atol": 0.0, "rtol": 2**-6}
        torch.testing.assert_close(measured.cls_attention().double(), exact[:, 0, 1:], **close)
        torch.testing.assert_close(1.0 - attention.row_sum(), exact[:, 1:, 0], **close)
    else:
        # The mean of many weights: rounding cancels, to a tenth where hundreds of queries are summed.
        close = {"atol": 0.0, "rtol": 2**-8}
        torch.testing.assert_close(measured.cls_attention().double(), exact.mean(dim=1), **close)
    torch.testing.assert_close(attention.column_sum().double(), patches.sum(dim=1), atol=0.0, rtol=2**-8)
    rows, columns = (
        torch.stack([torch.randperm(patches.shape[1])[:most] for _ in range(images)]) for most in (7, 9)
    )
    chosen = torch.stack([one[r][:, c] for one, r, c in zip(patches, rows, columns, strict=True)])
    block = attention.block(rows, columns)
    torch.testing.assert_close(block.double(), chosen, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("images", [1, 3])
def test_all_heads_of_an_image_at_once_or_one_after_the_other(
    images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, _ = heads(images, 50, 0.0)
    keys = centred_keys(key, 0.125)
    at_once = attention_rows(query[:, :, :7], keys)
    monkeypatch.setattr("ficoco_vllm.vision.cpu_attention._ROWS_SIZE", 3 * 7 * 50)
    torch.testing.assert_close(attention_rows(query[:, :, :7], keys), at_once, atol=1e-6, rtol=1e-6)


def test_centring_leaves_the_keys_as_they_are() -> None:
    """Also where they are fp32 and contiguous, which a conversion would hand through."""
    key = torch.randn(2, 3, 5, 8)
    before = key.clone()
    assert centred_keys(key, 0.5).is_contiguous()
    assert torch.equal(key, before)


def test_only_for_bfloat16_on_few_threads_and_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ficoco_vllm.vision.cpu_attention._has_products", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    image = torch.zeros(1, 577, 64, dtype=torch.bfloat16)
    assert is_faster(image)
    assert not is_faster(image.float())
    assert not is_faster(image[:, :100])
    assert not is_faster(image.to("meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not is_faster(image)


def test_not_where_the_cpu_has_no_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """There one head after the other takes twenty times as long as the fused kernel."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("ficoco_vllm.vision.cpu_attention._has_products", lambda: False)
    assert not is_faster(torch.zeros(1, 577, 64, dtype=torch.bfloat16))
