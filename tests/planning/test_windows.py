"""Decision windows: where they end, and which blocks of a segment's cache stand for which blocks of the prompt."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.windows import Window, find_ends, find_windows, read_ends

PATCHES = 576
METHODS = ["ficoco-l", "fastv", "pyramiddrop", "sparsevlm", "fitprune"]


def planner(**values: Any) -> DecoderPlanner:
    """A planner of whole windows for images of 576 tokens in 32 layers."""
    config = {"method": "ficoco-l", "windows": "turn", **values}
    return DecoderPlanner.shared(FicocoConfig.parse(config), 32, PATCHES)


def test_the_example_of_the_documentation() -> None:
    """50 tokens of text, an image, the window's end at 638, blocks of 16."""
    plan = planner(rounding=16).plan(700, [(50, PATCHES)], {"ficoco_keep": 64, "ficoco_window": 638})
    assert [row[0] for row in plan.counts] == [576, 496, 432, 352, 288, 208, 144, 64]
    assert plan.windows == (Window(50, 638, range(1)),)
    lengths = sorted({plan.reusable(length, 16) for length in range(680)})
    assert lengths == [0, 16, 32, 48, 640, 656, 672]
    assert [plan.prompt_block(3, index, 16) for index in (0, 2, 3, 24, 25)] == [0, 2, 3, 24, 39]
    assert [plan.prompt_block(7, index, 16) for index in (2, 3, 6, 7)] == [2, 3, 6, 39]
    assert [plan.num_kv_tokens(segment, 640) // 16 for segment in range(8)] == [40, 35, 31, 26, 22, 17, 13, 8]


@pytest.mark.parametrize(
    ("start", "num_tokens", "expected"),
    [
        (0, 700, 700),
        (0, 638, 638),
        (0, 637, 50),  # the window would be cut
        (0, 50, 50),
        (20, 600, 30),
        (50, 587, 0),  # it waits for a step that holds it
        (50, 588, 588),
        (626, 3, 3),  # the image is cached: the rest of its window is plain text
        (640, 10, 10),
    ],
)
def test_no_chunk_cuts_a_window(start: int, num_tokens: int, expected: int) -> None:
    plan = planner().plan(700, [(50, PATCHES)], {"ficoco_window": 638})
    assert plan.chunk(start, num_tokens) == expected
    # A prompt that keeps everything is split as in stock vLLM.
    whole = planner().plan(700, [(50, PATCHES)], {"ficoco_window": 638, "ficoco_keep": PATCHES})
    assert whole.chunk(start, num_tokens) == num_tokens


@settings(max_examples=300, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, PATCHES), min_size=4, max_size=4),
    text=st.integers(1, 80),
    ends=st.lists(st.integers(1, 2600), max_size=4),
    keep=st.integers(1, PATCHES),
    block=st.sampled_from([16, 32]),
    rounding=st.booleans(),
    method=st.sampled_from(METHODS),
)
def test_blocks_of_segments_stand_for_blocks_of_the_prompt(
    gaps: list[int],
    lengths: list[int],
    text: int,
    ends: list[int],
    keep: int,
    block: int,
    rounding: bool,
    method: str,
) -> None:
    """Windows cover the images; a reusable prefix is whole blocks in every segment and finds itself."""
    images, end = [], 0
    for gap, length in zip(gaps, lengths, strict=False):
        images.append((end + gap, length))
        end += gap + length
    num_prompt = end + text
    extra = {"ficoco_keep": keep, "ficoco_method": method}
    extra["ficoco_window"] = [place for place in ends if place <= num_prompt] or num_prompt
    plan = planner(rounding=block if rounding else 1).plan(num_prompt, images, extra)
    assert all(kept <= min(keep, length) for (_, length), kept in zip(images, plan.counts[-1], strict=True))
    assert [index for window in plan.windows for index in window.images] == list(range(len(images)))
    for window, after in zip(plan.windows, plan.windows[1:], strict=False):
        assert window.end <= after.start
    for window in plan.windows:
        assert window.start == images[window.images[0]][0]
        assert sum(images[window.images[-1]]) < window.end <= num_prompt
    longest = num_prompt + 3 * block
    lengths_found = sorted({plan.reusable(length, block) for length in range(longest)})
    assert all(plan.reusable(length, block) == length for length in lengths_found)
    for segment in range(8):
        held = [plan.num_kv_tokens(segment, length) for length in lengths_found]
        assert all(tokens % block == 0 for tokens in held)
        names = [plan.prompt_block(segment, index, block) for index in range(held[-1] // block)]
        assert names == sorted(set(names))  # injective and ascending
        # A prefix is found by the hashes of its blocks alone, and the next block is not among them.
        for length, tokens in zip(lengths_found, held, strict=True):
            assert all(name < length // block for name in names[: tokens // block])
            assert all(name >= length // block for name in names[tokens // block :])


def test_rounding_never_keeps_more_than_asked() -> None:
    rounded = planner(rounding=32)
    assert rounded.counts("ficoco-l", PATCHES, 100)[-1] == 96
    assert rounded.counts("ficoco-l", PATCHES, 64)[-1] == 64
    # 576 - 9 is less than a block away from all of them: the counts stay as published, and nothing is reusable.
    assert rounded.counts("ficoco-l", PATCHES, 9) == planner().counts("ficoco-l", PATCHES, 9)
    plan = rounded.plan(700, [(50, PATCHES)], {"ficoco_keep": 9})
    assert plan.reusable(700, 32) == 32


def test_a_window_in_a_block_that_the_prompt_does_not_fill_is_not_reused() -> None:
    """The block is filled by the answer, when its hash does not cover the window."""
    plan = planner(rounding=16).plan(79, [(50, 24)], {"ficoco_keep": 8})
    assert plan.counts[-1] == (8,)
    assert [plan.reusable(length, 16) for length in (64, 79, 80, 200)] == [48, 48, 80, 192]
    late = planner(rounding=16).plan(95, [(66, 28)], {"ficoco_keep": 12})
    assert [late.reusable(length, 32) for length in (64, 96, 200)] == [64, 64, 64]


def test_ends_follow_the_generation_prompt() -> None:
    marker = [7, 8]
    image, text = [0] * 5, [1, 2, 3]
    first = [9, *image, *text, 7, 8]
    assert find_ends(first, [(1, 5)], marker) == [11]
    # Later turns, a marker before the image, and another image: the first window stays where it was.
    second = [*first, 4, 4, 2, *text, 7, 8]
    assert find_ends(second, [(1, 5)], marker) == [11]
    third = [*second, 4, 2, *image, *text, 7, 8, 4]
    assert find_ends(third, [(1, 5), (21, 5)], marker) == [11, 31]
    assert find_ends([7, 8, *first], [(3, 5)], marker) == [13]
    # Without a marker the prompt decides; two images of one turn share a window.
    assert find_ends(second, [(1, 5)], []) == [len(second)]
    assert find_ends([*image, 1, *image, *text, 7, 8], [(0, 5), (6, 5)], marker) == [16]
    # A window ends where a step does, never before its image.
    assert find_ends(first, [(1, 5)], marker, longest=7) == [8]
    assert find_ends(first, [(1, 5)], marker, longest=3) == [7]


def test_ends_that_leave_no_text_are_passed_over() -> None:
    assert find_windows(40, [(3, 10)], [2, 7, 13, 20]) == (Window(3, 20, range(1)),)
    # An end inside the second image is none of the first window's either.
    assert find_windows(40, [(3, 10), (18, 10)], [20, 30]) == (Window(3, 30, range(2)),)
    assert find_windows(40, [(3, 10), (18, 10)], [15]) == (
        Window(3, 15, range(1)),
        Window(18, 40, range(1, 2)),
    )
    assert find_windows(40, [], [15]) == ()


@pytest.mark.parametrize("value", [0, 41, "20", True, 2.5, [3, None], {}])
def test_ends_that_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"ficoco_window = .* integers from 1 to 40"):
        read_ends(value, 40)


def test_ends_as_a_client_sends_them() -> None:
    assert read_ends([30.0, 20, 20], 40) == (20, 30)
    assert read_ends(40, 40) == (40,)


def test_a_window_that_no_step_holds_is_refused() -> None:
    small = planner(window_tokens=600)
    small.check_windows(small.plan(700, [(50, PATCHES)], {"ficoco_window": 650}))
    too_long = small.plan(700, [(50, PATCHES)], {"ficoco_window": 651})
    with pytest.raises(ValueError, match=r"ficoco_window: tokens 50 to 650 .* are 601; allowed: 600"):
        small.check_windows(too_long)
    # A prompt that keeps everything has no window.
    small.check_windows(small.plan(700, [(50, PATCHES)], {"ficoco_keep": PATCHES}))


def test_counts_are_planned_before_the_windows_are_known() -> None:
    """Savings of a long chat, and the largest image of a server with a short context: neither names its ends."""
    assert planner(window_tokens=600).plan(2000, [(50, PATCHES)], None).reduces


@pytest.mark.parametrize(
    ("settings_", "part"),
    [
        ({"method": "ficoco-v", "windows": "turn"}, "methods of the decoder"),
        ({"method": "ficoco-l", "windows": "prompt", "window_tokens": 700}, "windows = 'turn' only"),
        ({"method": "ficoco-l", "windows": "chat"}, "windows"),
        (
            {"method": "divprune", "window_tokens": 700},
            "window_tokens = 700 is allowed for methods of the decoder",
        ),
    ],
)
def test_settings_that_are_refused(settings_: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        FicocoConfig.parse(settings_)
