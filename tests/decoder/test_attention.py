"""The blocks of attention that the methods see, against the whole map of every head."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from ficoco_vllm.decoder.attention import DecoderHeads, ImageAttention
from ficoco_vllm.decoder.boundary import ImageGroup

H, KV, d, T, N = 6, 2, 32, 23, 5
# Two requests one after the other: rows of each, place of its image, and places of the text after it (in the
# second request with another image between).
LENGTHS = (T, T - 4)
IMAGES = (3, 6)
TEXTS = (range(8, T), (11, 12, 16, 17, 18))
# float32 against float64
CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def close(result: Tensor, expected: Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(result.double(), expected.double(), **CLOSE)


@pytest.fixture
def heads() -> DecoderHeads:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sum(LENGTHS), H, d, generator=generator)
    key = torch.randn(sum(LENGTHS), KV, d, generator=generator)
    return DecoderHeads(query, key, d**-0.5, H)


def group(requests: tuple[int, ...]) -> ImageGroup:
    """The images of some of the requests, as the layout has them."""
    most = max(len(TEXTS[r]) for r in requests)
    start = np.array([[r * T] for r in requests])
    text_place, has_text = np.zeros((len(requests), most), int), np.zeros((len(requests), most), bool)
    for row, r in enumerate(requests):
        text_place[row, most - len(TEXTS[r]) :] = TEXTS[r]
        has_text[row, most - len(TEXTS[r]) :] = True
    places, lengths = np.arange(max(LENGTHS[r] for r in requests)), np.array([[LENGTHS[r]] for r in requests])
    visual_place = np.array([[IMAGES[r]] for r in requests]) + np.arange(N)
    return ImageGroup(
        method="",
        visual=start + visual_place,
        kept=start + visual_place[:, :2],
        text=start + text_place,
        has_text=has_text,
        text_place=text_place,
        visual_place=visual_place,
        context=start + np.where(places < lengths, places, 0),
        num_cached=np.zeros(len(requests), dtype=np.int64),
        first_row=tuple(int(r * T + IMAGES[r]) for r in requests),
    )


def dense(heads: DecoderHeads, request: int, logits: bool) -> Tensor:
    """Head mean of the whole causal map of one request."""
    rows = slice(request * T, request * T + LENGTHS[request])
    query, key = heads.query[rows].double(), heads.key[rows].double().repeat_interleave(H // KV, dim=1)
    products = torch.einsum("qhd,khd->hqk", query, key) * heads.scale
    if logits:
        return products.mean(0)
    future = torch.ones(len(query), len(query)).triu(1).bool()
    return products.masked_fill(future, -torch.inf).softmax(-1).mean(0)


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize("requests", [(0,), (1,), (0, 1)])
def test_equals_the_whole_map(heads: DecoderHeads, logits: bool, requests: tuple[int, ...]) -> None:
    """The tokens of one image are a view; those of two prompts are gathered."""
    images = ImageAttention(heads, group(requests), visual=True, logits=logits)
    text, visual = images.text_attention(), images.visual_attention()
    source, target = torch.tensor([[1, 3]] * len(requests)), torch.tensor([[0, 2, 4]] * len(requests))
    blocks = visual.block(source, target), visual.block(source, target, text, 0.6)
    assert visual.shape == (len(requests), N, N)
    for b, r in enumerate(requests):
        whole = dense(heads, r, logits)
        columns = slice(IMAGES[r], IMAGES[r] + N)
        expected, pad = whole[list(TEXTS[r])][:, columns], text.shape[1] - len(TEXTS[r])
        close(text[b, pad:], expected)
        assert not text[b, :pad].any()
        among = whole[columns, columns]
        close(visual.dense()[b], among)
        close(visual.row_sum()[b], among.sum(1))
        close(visual.column_sum()[b], among.sum(0))
        direct = among[source[b]][:, target[b]]
        close(blocks[0][b], direct)
        indirect = expected[:, source[b]].T @ expected[:, target[b]]
        close(blocks[1][b], 0.6 * direct + 0.4 * indirect)
    assert visual.row_sum().dtype == torch.float64


@pytest.mark.parametrize("num_cached", [(2, 4), (0, 6), (3, 0)])
def test_keys_of_earlier_steps_count_as_those_of_this_one(
    heads: DecoderHeads, num_cached: tuple[int, int]
) -> None:
    """A prefix that lies in the KV cache: queries of the rest, keys of both. Rows that fill up a graph are not read."""
    whole = ImageAttention(heads, group((0, 1)), visual=True)
    cached = np.array(num_cached)[:, None]
    starts = (0, T)
    before = np.concatenate(
        [np.arange(start, start + n) for start, n in zip(starts, num_cached, strict=True)]
    )
    step = np.setdiff1d(np.arange(sum(LENGTHS)), before)
    row_of = np.argsort(np.concatenate([step, before]))
    key_of = np.argsort(np.concatenate([before, step]))
    where = group((0, 1))
    text_place = np.where(where.has_text, where.text_place, cached)
    where = replace(
        where,
        visual=row_of[where.visual],
        text=row_of[np.array([[0], [T]]) + text_place],
        text_place=text_place,
        context=key_of[where.context],
        num_cached=cached[:, 0],
    )
    query, key = (
        torch.cat([rows[step], torch.full_like(rows[:5], torch.nan)]) for rows in (heads.query, heads.key)
    )
    rest = replace(heads, query=query, key=key, cached_key=heads.key[before])
    part = ImageAttention(rest, where, visual=True)
    assert part.query.shape[2] < whole.query.shape[2] or 0 in num_cached
    maps = part.visual_attention(), whole.visual_attention()
    close(part.text_attention(), whole.text_attention())
    for name in ("row_sum", "column_sum", "dense"):
        result, expected = (getattr(one, name)() for one in maps)
        close(result, expected)
    text = ImageAttention(rest, where, visual=False)
    close(text.text_attention(), whole.text_attention())


def test_text_alone_looks_at_no_visual_query(heads: DecoderHeads) -> None:
    """Methods that read the text's attention only do not pay for the image's."""
    both = ImageAttention(heads, group((0, 1)), visual=True)
    text = ImageAttention(heads, group((0, 1)), visual=False)
    assert text.query.shape[2] < both.query.shape[2]
    torch.testing.assert_close(text.text_attention(), both.text_attention(), **CLOSE)


def test_two_workers_sum_to_the_whole(heads: DecoderHeads) -> None:
    """Each worker has half of the heads; the workers' sum divided by all heads is the mean, with the text once."""
    halves = [
        replace(heads, query=heads.query[:, 3 * part : 3 * part + 3], key=heads.key[:, part, None])
        for part in (0, 1)
    ]
    where = group((0, 1))
    whole = ImageAttention(heads, where, visual=True)
    parts = [ImageAttention(half, where, visual=True) for half in halves]
    close(sum(part.text_attention() for part in parts), whole.text_attention())
    maps = [part.visual_attention() for part in parts]
    close(sum(one.row_sum() for one in maps), whole.visual_attention().row_sum())
    close(sum(one.column_sum() for one in maps), whole.visual_attention().column_sum())

    def other_rank(total: Tensor) -> Tensor:
        """A collective takes contiguous tensors only; here the other rank holds zeros."""
        assert total.is_contiguous()
        return total

    alone = ImageAttention(replace(heads, all_reduce=other_rank), where, visual=True)
    assert torch.equal(alone.text_attention(), whole.text_attention())
    for name in ("row_sum", "column_sum", "dense"):
        result, expected = (getattr(one.visual_attention(), name)() for one in (alone, whole))
        assert torch.equal(result, expected)
    source, target, text = torch.tensor([[1], [2]]), torch.tensor([[0], [1]]), whole.text_attention()
    other = maps[1].block(source, target)
    summed = replace(halves[0], all_reduce=lambda part: part + other)
    result = ImageAttention(summed, where, visual=True).visual_attention().block(source, target, text, 0.6)
    close(result, whole.visual_attention().block(source, target, text, 0.6))
    rows = torch.tensor([[0, 5]])
    torch.testing.assert_close(
        halves[0].mean_key(rows) + halves[1].mean_key(rows), heads.key[rows].mean(dim=2)
    )
