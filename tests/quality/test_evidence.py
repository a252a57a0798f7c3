"""Bounds that hold at all times, and the alarm."""

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ficoco_vllm.quality.evidence import (
    NUM_BELOW,
    Tally,
    evidence_above,
    evidence_below,
    interval,
    settled_alarm,
    updated_alarm,
)

means = st.floats(0.02, 0.99)


@pytest.mark.parametrize("mean", [0.3, 0.9, 0.98])
@pytest.mark.parametrize("scores", ["0 or 1", "between"])
def test_wealth_is_a_fair_game_at_best(mean: float, scores: str) -> None:
    """Expected wealth after a score, exactly: 1 where the score is 0 or 1, less where it lies between."""
    between = [(2 * mean - 1, 0.5), (1.0, 0.5)] if mean > 0.5 else [(0.0, 0.5), (2 * mean, 0.5)]
    outcomes = [(1.0, mean), (0.0, 1 - mean)] if scores == "0 or 1" else between
    assert sum(score * share for score, share in outcomes) == pytest.approx(mean)
    for evidence in (evidence_above, evidence_below):
        expected = sum(share * math.exp(evidence(Tally(1, score), mean)) for score, share in outcomes)
        if scores == "0 or 1":
            assert expected == pytest.approx(1)
        else:
            assert expected < 1


def test_evidence_is_a_product_over_scores() -> None:
    """Against plain fractions: mean 1/2, one alternative after the other."""
    agreeing, others = 3, 2
    wealth = []
    for far in ("9/10", "7/10", "1/2", "1/4", "1/10", "0"):
        q = 1 - Fraction(far) / 2
        wealth.append((2 * q) ** agreeing * (2 * (1 - q)) ** others)
    expected = sum(wealth) / len(wealth)
    assert math.exp(evidence_above(Tally(5, 3.0), 0.5)) == pytest.approx(float(expected))


@pytest.mark.parametrize("mean", [0.5, 0.9, 0.98])
def test_a_true_mean_is_rarely_left_out_however_often_one_looks(mean: float) -> None:
    draw = random.Random(1)
    left_out = 0
    for _ in range(300):
        tally = Tally()
        for _ in range(300):
            tally = tally.plus(float(draw.random() < mean))
            least, needed = max(evidence_above(tally, mean), evidence_below(tally, mean)), math.log(2 / 0.05)
            if least >= needed:
                left_out += 1
                break
    # 15 are expected at most; 28 would be exceeded by chance once in a thousand.
    assert left_out <= 28


@given(st.integers(0, 400), st.floats(0, 1))
def test_bounds_enclose_the_mean_and_agree_with_the_evidence(count: int, share: float) -> None:
    tally = Tally(count, float(round(share * count)))
    low, high = interval(tally, 0.95)
    assert 0 <= low <= tally.mean <= high <= 1
    needed = math.log(40)
    if low > 0.001:
        assert evidence_above(tally, low - 0.0005) >= needed
    if 0 < low + 1e-6 < tally.mean:
        assert evidence_above(tally, low + 1e-6) <= needed + 1e-3
    if high < 0.999:
        assert evidence_below(tally, high + 0.0005) >= needed


def test_more_of_the_same_narrows_the_interval() -> None:
    assert interval(Tally(), 0.95) == (0.0, 1.0)
    widths = [high - low for low, high in (interval(Tally(n, 0.9 * n), 0.95) for n in (10, 100, 1000, 10000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.03
    # Without a disagreement, about a third more than the 149 scores that a single look at a fixed number needs.
    assert interval(Tally(180, 180.0), 0.9)[0] < 0.98 < interval(Tally(250, 250.0), 0.9)[0]


@given(means, st.floats(0, 1))
def test_the_alarm_is_fair_as_well(target: float, score: float) -> None:
    before = updated_alarm((), 1.0, target)
    after = updated_alarm(before, score, target)
    lowest, highest = updated_alarm(before, 1.0, target), updated_alarm(before, 0.0, target)
    assert len(after) == NUM_BELOW
    assert all(low <= now <= high for low, now, high in zip(lowest, after, highest, strict=True))
    expected = [target * low + (1 - target) * high for low, high in zip(lowest, highest, strict=True)]
    assert expected == pytest.approx([wealth + 1 for wealth in before])


def test_the_alarm_settles_while_all_is_well_and_sounds_soon_when_it_is_not() -> None:
    alarm: tuple[float, ...] = ()
    for _ in range(2000):
        alarm = updated_alarm(alarm, 1.0, 0.98)
    assert sum(alarm) / NUM_BELOW == pytest.approx(settled_alarm(0.98), rel=1e-6)
    scores = 0
    draw = random.Random(0)
    while sum(alarm) / NUM_BELOW < 1000:
        alarm = updated_alarm(alarm, float(draw.random() < 0.6), 0.98)
        scores += 1
    assert scores < 20
