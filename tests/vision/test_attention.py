"""Lazy attention against the map that it stands for."""

import pytest
import torch
from torch import Tensor

from ficoco_vllm.vision.attention import ClipAttention, attention_with_lse

# float32: exp(x - logsumexp) against softmax differ by rounding only
TOLERANCE = 1e-6


def make(N: int, logits: bool = False, biased: bool = False) -> tuple[ClipAttention, Tensor]:
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
    lazy = ClipAttention(query, key, lse, scale, bias, lambda total: total / H, logits)
    return lazy, (scores if logits else probabilities).mean(dim=1)


@pytest.mark.parametrize("N", [1, 2, 63, 144])
@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_dense(N: int, logits: bool, biased: bool) -> None:
    lazy, dense = make(N, logits, biased)
    tolerance = {"atol": 1e-5 if logits else TOLERANCE, "rtol": 1e-5}  # sums of N logits are larger
    patches = dense[:, 1:, 1:]
    assert lazy.shape == patches.shape
    torch.testing.assert_close(lazy.dense(), patches, **tolerance)
    torch.testing.assert_close(lazy.row_sum(), patches.sum(dim=-1, dtype=torch.float64), **tolerance)
    torch.testing.assert_close(lazy.cls_attention(), dense[:, 0, 1:], **tolerance)
    index = torch.tensor([[0, N - 1], [N - 1, N // 2]])
    expected = patches[torch.arange(2)[:, None], index]
    torch.testing.assert_close(lazy.rows(index), expected, **tolerance)


def test_keys_are_the_head_mean() -> None:
    lazy, _ = make(10)
    torch.testing.assert_close(lazy.keys(), lazy.key[:, :, 1:].mean(dim=1))


def test_portable_way_equals_the_cpu_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices run, in chunks of one image."""
    from ficoco_vllm.vision import attention

    query, key, value = torch.randn(3, 3, 2, 9, 32).unbind(0)
    bias = torch.randn(3, 9)
    output, lse = attention_with_lse(query, key, value, 0.2, bias)
    monkeypatch.setattr(attention, "_SCRATCH_BYTES", 1)
    other_output, other_lse = attention.portable_attention_with_lse(query, key, value, 0.2, bias)
    torch.testing.assert_close(other_output, output, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(other_lse, lse, atol=TOLERANCE, rtol=0)
