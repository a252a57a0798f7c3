"""Indices against a list of tokens that is shortened by hand."""

from itertools import accumulate

import numpy as np
import pytest

from ficoco_vllm.decoder.boundary import boundary, num_rows
from ficoco_vllm.planning.decoder import RequestPlan


def plan(num_prompt: int, images: list[tuple[int, int]], counts: list[list[int]]) -> RequestPlan:
    """A plan with these counts."""
    return RequestPlan("ficoco-l", num_prompt, tuple(images), tuple(tuple(row) for row in counts))


# Two images, text between; a request that decodes; one image, resumed with three generated tokens.
PLANS = [
    plan(20, [(3, 6), (11, 5)], [[6, 5], [4, 2], [4, 1]]),
    None,
    plan(12, [(2, 6)], [[6], [4], [1]]),
]
QUERY_START = [0, 20, 21, 36]


def tokens_of(segment: int) -> list[tuple[int, int]]:
    """(request, place in the prompt) of each row, where the first tokens of an image are those that stay."""
    rows = []
    for index, result in enumerate(PLANS):
        for place in range(QUERY_START[index + 1] - QUERY_START[index]):
            inside = [
                (place - offset) < count
                for (offset, length), count in (
                    zip(result.images, result.counts[segment], strict=True) if result else ()
                )
                if offset <= place < offset + length
            ]
            if all(inside):
                rows.append((index, place))
    return rows


@pytest.mark.parametrize("segment", [0, 1])
def test_boundary(segment: int) -> None:
    result = boundary(QUERY_START, PLANS, segment, lambda method: False)
    before, after = tokens_of(segment), tokens_of(segment + 1)
    assert [len(before), len(after)] == [sum(num_rows(QUERY_START, PLANS, segment + i)) for i in (0, 1)]
    # Filled with the first tokens of each image, the template is the shortened list.
    assert [before[row] for row in result.source] == after
    starts = [0, *accumulate(num_rows(QUERY_START, PLANS, segment))]
    seen = []
    for group in result.groups:
        for b in range(len(group.visual)):
            (request,) = {before[row][0] for row in group.visual[b]}
            plan_ = PLANS[request]
            assert plan_ is not None
            offset = before[group.visual[b][0]][1]
            image = plan_.images.index(next(i for i in plan_.images if i[0] == offset))
            seen.append((request, image))
            assert group.visual.shape[1] == plan_.counts[segment][image]
            assert [after[row] for row in group.kept[b]] == [
                (request, offset + i) for i in range(plan_.counts[segment + 1][image])
            ]
            inside = {place for start, length in plan_.images for place in range(start, start + length)}
            end = offset + plan_.images[image][1]
            text = [before[row] for row in group.text[b][group.has_text[b]]]
            assert text == [
                (request, place) for place in range(end, plan_.num_prompt_tokens) if place not in inside
            ]
            assert not group.has_text[b][: -len(text)].any()  # padded on the left
            np.testing.assert_array_equal(group.visual[b] - starts[request], group.visual_place[b])
            np.testing.assert_array_equal(
                (group.text[b] - starts[request])[group.has_text[b]], group.text_place[b][group.has_text[b]]
            )
            prompt = [
                row
                for row, (r, place) in enumerate(before)
                if r == request and place < plan_.num_prompt_tokens
            ]
            assert group.context[b][: len(prompt)].tolist() == prompt
    expected = [
        (index, image)
        for index, p in enumerate(PLANS)
        if p
        for image in range(len(p.images))
        if p.counts[segment + 1][image] < p.counts[segment][image]
    ]
    assert sorted(seen) == expected


def test_images_of_one_shape_go_together() -> None:
    equal = [plan(12, [(2, 6)], [[6], [4]]), plan(15, [(4, 6)], [[6], [4]])]
    together = boundary([0, 12, 27], equal, 0, lambda method: False)
    assert [group.visual.shape for group in together.groups] == [(2, 6)]
    apart = boundary([0, 12, 27], equal, 0, lambda method: True)
    assert [group.visual.shape for group in apart.groups] == [(1, 6), (1, 6)]
