"""The schedule: host-side integers that end at exactly `keep`."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ficoco_vllm.reduction.schedule import KINDS, default_start_layer, make_schedule


def run(schedule: dict[int, int], num_tokens: int, num_extra: int) -> int:
    for count in schedule.values():
        num_tokens += num_extra - count if count else 0
    return num_tokens


def test_the_papers_schedule() -> None:
    schedule = make_schedule("even", 576, 64, range(11, 23))
    assert list(schedule.values()) == [43] * 8 + [42] * 4
    assert list(schedule) == list(range(11, 23))


def test_one_shot_and_geometric() -> None:
    assert make_schedule("one-shot", 576, 64, [3, 5]) == {3: 512, 5: 0}
    # PyramidDrop halves: 576, 288, 144, 72.
    assert make_schedule("geometric", 576, 72, [8, 16, 24]) == {8: 288, 16: 144, 24: 72}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS), num_tokens=st.integers(1, 600), data=st.data(), num_extra=st.integers(0, 1)
)
def test_ends_at_keep(kind: str, num_tokens: int, data: st.DataObject, num_extra: int) -> None:
    keep = data.draw(st.integers(min(1 + num_extra, num_tokens), num_tokens))
    layers = data.draw(st.lists(st.integers(0, 31), min_size=1, max_size=12, unique=True).map(sorted))
    schedule = make_schedule(kind, num_tokens, keep, layers, num_extra)
    assert run(schedule, num_tokens, num_extra) == keep
    assert list(schedule) == layers


def test_fused_tokens_are_counted() -> None:
    schedule = make_schedule("even", 576, 64, range(12), num_extra=1)
    assert list(schedule.values()) == [44] * 8 + [43] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("even", 576, 0, [1]), "keep = 0"),
        (("even", 576, 577, [1]), "keep = 577"),
        (("even", 576, 64, []), "at least one reducing layer"),
        (("odd", 576, 64, [1]), "even, one-shot, geometric"),
        (("even", 576, 64, [3, 2]), "ascend"),
        (("even", 576, 64, [3, 3]), "none twice"),
        (([100, 100], 576, 64, [1, 2]), "keeps 376 tokens, not keep = 64"),
        (([512], 576, 64, [1, 2]), "2 reducing layers"),
        (([600, -88], 576, 64, [1, 2]), "removes 600 of 576"),
    ],
)
def test_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments)


def test_per_call_maximum() -> None:
    with pytest.raises(ValueError, match=r"removes 512 of 576 tokens at layer 1, where 0 to 288"):
        make_schedule("one-shot", 576, 64, [1], max_removed=lambda n: n // 2)


def test_counts_of_ones_own() -> None:
    assert make_schedule([500, 0, 12], 576, 64, [1, 2, 3]) == {1: 500, 2: 0, 3: 12}


@pytest.mark.parametrize(("depth", "start"), [(24, 11), (12, 5), (8, 3), (4, 1), (1, 0)])
def test_start_layer(depth: int, start: int) -> None:
    assert default_start_layer(depth) == start


def test_start_layer_refused() -> None:
    with pytest.raises(ValueError, match="num_layers = 0"):
        default_start_layer(0)
