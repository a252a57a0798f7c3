"""Lazy attention compared with the written map."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ficoco_vllm.vision import attention
from ficoco_vllm.vision.attention import ClipHeads, attention_with_lse

# float32: exp(x - logsumexp) against softmax differ by rounding only
TOLERANCE = 1e-6


def make(N: int, logits: bool = False, biased: bool = False) -> tuple[ClipHeads, Tensor]:
    """A lazy map over N patches and [CLS], and the dense head mean with [CLS]."""
    B, H, d = 2, 3, 32
    generator = torch.Generator().manual_seed(N)
    query, key, value = torch.randn(3, B, H, N + 1, d, generator=generator).unbind(0)
    bias = torch.randn(B, N + 1, generator=generator) if biased else None
    scale = d**-0.5
    output, lse = attention_with_lse(query, key, value, scale, bias)
    scores = query @ key.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias[:, None, None]
    probabilities = scores.softmax(dim=-1)
    torch.testing.assert_close(output, probabilities @ value, atol=TOLERANCE * 10, rtol=0)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1), atol=TOLERANCE * 10, rtol=0)
    lazy = ClipHeads(query, key, lse, scale, bias, H, logits=logits)
    return lazy, (scores if logits else probabilities).mean(dim=1)


@pytest.mark.parametrize("N", [1, 2, 63, 144])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("handed_out", [True, False])
def test_equals_dense(N: int, logits: bool, biased: bool, handed_out: bool) -> None:
    heads, dense = make(N, logits, biased)
    if not handed_out:  # as on a GPU
        heads = replace(heads, given_lse=None)
    lazy = heads.visual_attention()
    tolerance = {"atol": 1e-5 if logits else TOLERANCE, "rtol": 1e-5}  # sums of N logits are larger
    patches = dense[:, 1:, 1:]
    assert lazy.shape == patches.shape
    torch.testing.assert_close(lazy.dense(), patches, **tolerance)
    torch.testing.assert_close(lazy.row_sum(), patches.sum(dim=-1, dtype=torch.float64), **tolerance)
    torch.testing.assert_close(lazy.column_sum(), patches.sum(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heads.cls_attention(), dense[:, 0, 1:], **tolerance)
    source, target = torch.tensor([[0, N - 1], [N - 1, N // 2]]), torch.arange(N).expand(2, N)
    expected = patches[torch.arange(2)[:, None], source]
    torch.testing.assert_close(lazy.block(source, target), expected, **tolerance)
    torch.testing.assert_close(
        lazy.block(source, source), expected.gather(2, source[:, None].expand(2, 2, 2)), **tolerance
    )
    text = torch.rand(2, 4, N, generator=torch.Generator().manual_seed(0))
    indirect = text.gather(2, source[:, None].expand(2, 4, 2)).transpose(1, 2) @ text
    torch.testing.assert_close(
        lazy.block(source, target, text, 0.6), 0.6 * expected + 0.4 * indirect, **tolerance
    )


def test_row_sums_resolve_more_than_fp32() -> None:
    """If [CLS] receives almost no attention, the sums differ from 1 by less than fp32 resolves."""
    heads, _ = make(20)
    key = heads.key.clone()
    key[:, :, 0] = -60 * heads.query.mean(dim=2)
    key[:, :, 1:] *= 0.1
    _, lse = attention_with_lse(heads.query, key, key, heads.scale, None)
    heads = replace(heads, key=key, given_lse=lse)
    logits = heads.query.double() @ key.double().transpose(-1, -2) * heads.scale
    given = logits.softmax(-1).mean(1)[:, 1:, 0]
    small = given < 1e-8
    assert small.any(), "otherwise this tests nothing"
    result = 1.0 - heads.visual_attention().row_sum()
    torch.testing.assert_close(result[small], given[small], rtol=1e-4, atol=2**-52)


@pytest.mark.parametrize("needed", [{"cls_attention"}, {"keys"}, {"keys", "cls_attention"}])
@pytest.mark.parametrize("handed_out", [True, False])
def test_any_combination_of_signals(needed: set[str], handed_out: bool) -> None:
    """The [CLS] row and the keys are the same whether one pass serves several signals or not."""
    heads, dense = make(10)
    heads = replace(heads, needed=frozenset(needed), given_lse=heads.given_lse if handed_out else None)
    if "cls_attention" in needed:
        torch.testing.assert_close(heads.cls_attention(), dense[:, 0, 1:], atol=TOLERANCE, rtol=1e-5)
    if "keys" in needed:
        torch.testing.assert_close(heads.keys(), heads.key[:, :, 1:].mean(dim=1))


def test_two_ranks_sum_to_the_whole() -> None:
    """Each sees some of the heads; the sums over the ranks, divided by all heads, are the means."""
    heads, dense = make(12)
    parts = [
        replace(heads, query=heads.query[:, part], key=heads.key[:, part], given_lse=heads.given_lse[:, part])
        for part in (slice(0, 1), slice(1, 3))
    ]
    maps = [part.visual_attention() for part in parts]

    def other_rank(total: Tensor) -> Tensor:
        """A collective takes contiguous tensors only; here the other rank holds zeros."""
        assert total.is_contiguous()
        return total

    alone = replace(heads, all_reduce=other_rank)
    for name in ("cls_attention", "keys"):
        torch.testing.assert_close(getattr(alone, name)(), getattr(heads, name)())
    assert torch.equal(alone.visual_attention().column_sum(), heads.visual_attention().column_sum())
    assert torch.equal(alone.visual_attention().dense(), heads.visual_attention().dense())
    # The signal is the mean of one minus something, of which each rank holds its share of something.
    rendered = 1.0 - sum(1.0 - one.row_sum() for one in maps)
    torch.testing.assert_close(rendered, heads.visual_attention().row_sum(), atol=1e-7, rtol=0)
    torch.testing.assert_close(
        sum(part.cls_attention() for part in parts), dense[:, 0, 1:], atol=TOLERANCE, rtol=0
    )
    torch.testing.assert_close(sum(part.keys() for part in parts), heads.keys())
    source, target = torch.tensor([[1], [3]]), torch.tensor([[0, 2], [4, 5]])
    total = sum(one.block(source, target) for one in maps)
    torch.testing.assert_close(total, heads.visual_attention().block(source, target), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_of_a_gpu_returns_its_normalisers(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes on a device without data; with a bias, its rows are aligned as the kernel demands."""
    B, H, N, d = 2, 3, 577, 64
    query = torch.empty(B, H, N, d, dtype=torch.bfloat16, device="meta")
    bias = torch.empty(B, N, dtype=torch.bfloat16, device="meta") if biased else None
    taken = "efficient" if biased else "flash"  # FlashAttention takes no bias
    for kind in ("flash", "efficient"):
        monkeypatch.setattr(attention, f"can_use_{kind}_attention", lambda params, kind=kind: kind == taken)
    masks = []
    plain = torch.ops.aten._scaled_dot_product_efficient_attention

    def efficient(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *rest: object, **options: object
    ) -> object:
        masks.append(mask)
        return plain(query, key, value, mask, *rest, **options)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient)
    output, lse = attention_with_lse(query, query, query, d**-0.5, bias)
    assert output.shape == (B, H, N, d)
    assert output.dtype == torch.bfloat16
    assert lse is not None
    assert lse.shape == (B, H, N)
    assert lse.dtype == torch.float32
    assert len(masks) == biased
    for mask in masks:
        assert mask.shape == (B, H, N, N)
        assert all(stride * mask.element_size() % 16 == 0 for stride in mask.stride()[:3])


def test_other_devices_return_none() -> None:
    query = torch.empty(1, 2, 9, 32, device="meta")
    output, lse = attention_with_lse(query, query, query, 0.2, None)
    assert output.shape == query.shape
    assert lse is None
