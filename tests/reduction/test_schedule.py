"""The schedule: host-side integers that end at exactly `keep`."""

from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ficoco_vllm.reduction.schedule import KINDS, default_start_layer, make_schedule
from ficoco_vllm.reduction.stage import all_but_one
from ficoco_vllm.reduction.stages.bipartite import half

LIMITS: dict[str, Callable[[int], int]] = {
    "all but one": all_but_one,
    "half": half,
    "a tenth": lambda num_tokens: num_tokens // 10,
    "three": lambda num_tokens: min(3, max(num_tokens - 1, 0)),
}


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


def reachable(num_tokens: int, num_layers: int, num_extra: int, most: Callable[[int], int]) -> set[int]:
    """Every count that any schedule can end at, by trying all of them."""
    counts = {num_tokens}
    for _ in range(num_layers):
        removals = [(left, r) for left in counts for r in range(1, most(left) + 1)]
        counts |= {left - r + num_extra for left, r in removals if r >= num_extra}
    return counts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_tokens=st.integers(1, 45),
    num_layers=st.integers(1, 6),
    num_extra=st.integers(0, 1),
    limit=st.sampled_from(sorted(LIMITS)),
    data=st.data(),
)
@example(num_tokens=40, num_layers=4, num_extra=0, limit="half", data=None)
@example(num_tokens=2, num_layers=1, num_extra=1, limit="all but one", data=None)
def test_even_wherever_any_schedule_can(
    num_tokens: int, num_layers: int, num_extra: int, limit: str, data: st.DataObject | None
) -> None:
    """Exactly `keep` if any schedule ends there, losses that never grow, and the plain split if it is possible."""
    most, layers = LIMITS[limit], range(num_layers)
    possible = reachable(num_tokens, num_layers, num_extra, most)
    keeps = range(1, num_tokens + 1) if data is None else [data.draw(st.integers(1, num_tokens))]
    for keep in keeps:
        if keep not in possible:
            with pytest.raises(ValueError, match=f"can reach {min(possible)} of {num_tokens} at least"):
                make_schedule("even", num_tokens, keep, layers, num_extra, most)
            continue
        schedule = make_schedule("even", num_tokens, keep, layers, num_extra, most)
        removed = list(schedule.values())
        assert run(schedule, num_tokens, num_extra) == keep
        assert removed == sorted(removed, reverse=True)
        each, rest = divmod(num_tokens - keep, num_layers)
        losses = [each + (layer < rest) for layer in layers]
        plain = [loss + num_extra if loss else 0 for loss in losses]
        lefts = [num_tokens - sum(losses[:layer]) for layer in layers]
        if all(count <= most(left) for count, left in zip(plain, lefts, strict=True)):
            assert removed == plain


def test_what_a_late_layer_cannot_lose_an_early_one_does() -> None:
    """576 to 9 by halves: the last of twelve even losses would be 47 of 56."""
    schedule = make_schedule("even", 576, 9, range(12), max_removed=half)
    assert list(schedule.values()) == [56] * 9 + [36, 18, 9]


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
    message = "keep = 64: 2 reducing layers can reach 144 of 576 at least, .* no more than 288"
    with pytest.raises(ValueError, match=message):
        make_schedule("even", 576, 64, [1, 2], max_removed=half)
    with pytest.raises(ValueError, match="keep = 64: 1 reducing layer can reach 288 of 576"):
        make_schedule("even", 576, 64, [1], max_removed=half)
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
