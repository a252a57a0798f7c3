"""Indices against a list of tokens that is shortened by hand."""

from itertools import accumulate

import pytest

from ficoco_vllm.decoder.boundary import Part, boundary, num_rows
from ficoco_vllm.planning.decoder import RequestPlan

Token = tuple[int, int]


def plan(
    num_prompt: int, images: list[tuple[int, int]], counts: list[list[int]], ends: tuple[int, ...] = ()
) -> RequestPlan:
    """A plan with these counts."""
    return RequestPlan("ficoco-l", num_prompt, tuple(images), tuple(tuple(row) for row in counts), ends)


# Two images, text between; a request that decodes; one image, resumed with three generated tokens.
TWO = plan(20, [(3, 6), (11, 5)], [[6, 5], [4, 2], [4, 1]])
ONE = plan(12, [(2, 6)], [[6], [4], [1]])
# A window for each of the two images; text follows both.
APART = plan(24, [(3, 6), (13, 5)], [[6, 5], [4, 2], [4, 1]], (11, 21))
STEPS: dict[str, list[Part | None]] = {
    "whole prompts": [Part(TWO, 0, 20), None, Part(ONE, 0, 15)],
    "both windows": [Part(APART, 0, 24), None, Part(ONE, 0, 15)],
    "first window": [Part(APART, 0, 13), Part(ONE, 0, 12)],
    "text before": [Part(APART, 2, 13), Part(ONE, 1, 12)],
    "second window": [Part(APART, 11, 23), None, Part(APART, 13, 24), Part(TWO, 0, 20)],
    "beside decoding": [Part(ONE, 12, 13), Part(APART, 11, 21), Part(ONE, 9, 12)],
}


def tokens_of(part: Part, segment: int, start: int, end: int) -> list[int]:
    """Positions that a segment holds, where the first tokens of an image are those that stay."""
    gone = {
        place
        for (offset, length), count in zip(part.plan.images, part.plan.counts[segment], strict=True)
        for place in range(offset + count, offset + length)
    }
    return [place for place in range(start, end) if place not in gone]


def rows_of(parts: list[Part | None], segment: int) -> list[Token]:
    """(request, position) of each row of a step."""
    rows = []
    for index, part in enumerate(parts):
        positions = tokens_of(part, segment, part.start, part.end) if part else [0]
        rows += [(index, place) for place in positions]
    return rows


def cached_of(parts: list[Part | None], segment: int) -> list[Token]:
    """The same of the keys that the step reads from the cache."""
    return [
        (index, place)
        for index, part in enumerate(parts)
        if part and part.windows
        for place in tokens_of(part, segment, 0, part.start)
    ]


@pytest.mark.parametrize("segment", [0, 1])
@pytest.mark.parametrize("name", list(STEPS))
def test_boundary(name: str, segment: int) -> None:
    parts = STEPS[name]
    query_start = [0, *accumulate(part.end - part.start if part else 1 for part in parts)]
    result = boundary(query_start, parts, segment, lambda method: False)
    before, after = rows_of(parts, segment), rows_of(parts, segment + 1)
    assert [len(before), len(after)] == [sum(num_rows(query_start, parts, segment + i)) for i in (0, 1)]
    # Filled with the first tokens of each image, the template is the shortened list.
    assert [before[row] for row in result.source] == after
    keys = cached_of(parts, segment) + before
    seen = []
    for group in result.groups:
        for b in range(len(group.visual)):
            (request,) = {before[row][0] for row in group.visual[b]}
            part = parts[request]
            assert part is not None
            images = part.plan.images
            held = tokens_of(part, segment, 0, part.end)
            offset = before[group.visual[b][0]][1]
            image = images.index(next(i for i in images if i[0] == offset))
            window = next(window for window in part.windows if image in window.images)
            seen.append((request, image))
            assert group.num_cached[b] == len(tokens_of(part, segment, 0, part.start))
            assert group.first_row[b] == query_start[request] + offset - part.start
            assert group.visual.shape[1] == part.plan.counts[segment][image]
            assert [after[row] for row in group.kept[b]] == [
                (request, offset + i) for i in range(part.plan.counts[segment + 1][image])
            ]
            inside = {place for start, length in images for place in range(start, start + length)}
            expected = [place for place in range(sum(images[image]), window.end) if place not in inside]
            text = [before[row] for row in group.text[b][group.has_text[b]]]
            assert text == [(request, place) for place in expected]
            assert not group.has_text[b][: -len(text)].any()  # padded on the left
            assert [held[place] for place in group.text_place[b][group.has_text[b]]] == expected
            assert [held[place] for place in group.visual_place[b]] == [
                before[row][1] for row in group.visual[b]
            ]
            context = [(request, place) for place in held if place < window.end]
            assert [keys[row] for row in group.context[b][: len(context)]] == context
    reduced = [
        (index, image)
        for index, part in enumerate(parts)
        for window in (part.windows if part else ())
        for image in window.images
        if part and part.plan.counts[segment + 1][image] < part.plan.counts[segment][image]
    ]
    assert sorted(seen) == reduced


def test_no_step_cuts_a_window() -> None:
    with pytest.raises(AssertionError, match="no step cuts a window"):
        boundary([0, 10], [Part(APART, 0, 10)], 0, lambda method: False)


def test_images_of_one_shape_go_together() -> None:
    equal = [plan(12, [(2, 6)], [[6], [4]]), plan(15, [(4, 6)], [[6], [4]])]
    parts = [Part(result, 0, result.num_prompt_tokens) for result in equal]
    together = boundary([0, 12, 27], parts, 0, lambda method: False)
    assert [group.visual.shape for group in together.groups] == [(2, 6)]
    apart = boundary([0, 12, 27], parts, 0, lambda method: True)
    assert [group.visual.shape for group in apart.groups] == [(1, 6), (1, 6)]
