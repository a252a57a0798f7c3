"""The blocks of attention that the methods see, against the whole map of every head."""

import pytest
import torch

from ficoco_vllm.decoder.attention import DecoderHeads

H, KV, d, T = 6, 2, 16, 23


@pytest.fixture
def heads() -> DecoderHeads:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2 * T, H, d, generator=generator)
    key = torch.randn(2 * T, KV, d, generator=generator)
    return DecoderHeads(query, key, d**-0.5, H, lambda total: total)


def dense(heads: DecoderHeads, rows: slice, logits: bool) -> torch.Tensor:
    """Head mean of the whole causal map of one request."""
    query, key = heads.query[rows].double(), heads.key[rows].double().repeat_interleave(H // KV, dim=1)
    products = torch.einsum("qhd,khd->hqk", query, key) * heads.scale
    if logits:
        return products.mean(0)
    future = torch.ones(T, T).triu(1).bool()
    return products.masked_fill(future, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("length", [T, T - 4])
def test_equals_the_whole_map(heads: DecoderHeads, logits: bool, length: int) -> None:
    """Two requests, the second one shorter and filled up."""
    context = torch.arange(2 * T).view(2, T).clone()
    context[1, length:] = T
    columns = torch.tensor([[3, 4, 5], [7, 8, 9]])
    places = torch.tensor([[5, 11, 18], [8, 9, length - 1]])
    found = heads.mean_attention(context.gather(1, places), places, context, columns, logits)
    for b in range(2):
        expected = dense(heads, slice(b * T, b * T + T), logits)[places[b]][:, columns[b]]
        # float32 against float64
        torch.testing.assert_close(found[b].double(), expected, atol=1e-6, rtol=1e-5)


def test_two_workers_sum_to_the_whole(heads: DecoderHeads) -> None:
    """Each sees half of the heads; the sum over workers divided by all heads is the mean."""
    context = torch.arange(T)[None]
    places, columns = torch.tensor([[20, 22]]), torch.tensor([[1, 2, 3, 4]])
    whole = heads.mean_attention(places, places, context, columns)
    halves = [
        DecoderHeads(
            heads.query[:, h : h + 3], heads.key[:, h // 3 : h // 3 + 1], heads.scale, H, lambda t: t
        )
        for h in (0, 3)
    ]
    parts = sum(half.mean_attention(places, places, context, columns) for half in halves)
    torch.testing.assert_close(parts, whole)
    rows = torch.tensor([[0, 5]])
    torch.testing.assert_close(
        halves[0].mean_key(rows) + halves[1].mean_key(rows), heads.key[rows].mean(dim=2)
    )
