"""The control law, on traffic of which the agreement at every budget is known."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ficoco_vllm.quality.allowance import NUM_RESERVED, Allowance
from ficoco_vllm.quality.controller import State, next_rungs, record, start
from ficoco_vllm.quality.evidence import interval
from ficoco_vllm.quality.settings import QualitySettings

SETTINGS = QualitySettings(target_agreement=0.9).on_model(576)
LADDER = SETTINGS.ladder or ()
EASY = (0.99, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
HARD = (0.3, 0.5, 0.6, 0.8, 0.97, 1.0, 1.0)


def compare(
    state: State, agreements: Sequence[float], draw: random.Random, settings: QualitySettings = SETTINGS
) -> State:
    """One comparison, as a server makes it."""
    rungs = reversed(next_rungs(settings, state, top_reduces=False))
    return record(settings, state, [(index, float(draw.random() < agreements[index])) for index in rungs])


def settle(
    state: State,
    agreements: Sequence[float],
    draw: random.Random,
    count: int,
    settings: QualitySettings = SETTINGS,
) -> State:
    """Many comparisons."""
    for _ in range(count):
        state = compare(state, agreements, draw, settings)
    return state


def test_it_starts_with_all_tokens() -> None:
    assert LADDER == (32, 64, 96, 128, 192, 288, 576)
    state = start(SETTINGS)
    assert LADDER[state.served] == 576
    assert next_rungs(SETTINGS, state, top_reduces=False) == (0,), "the smallest promises the most"
    assert next_rungs(SETTINGS, state, top_reduces=True) == (0, 6)


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_smallest_budget_that_holds_the_target(seed: int) -> None:
    draw = random.Random(seed)
    assert LADDER[settle(start(SETTINGS), EASY, draw, 400).served] == 32
    assert LADDER[settle(start(SETTINGS), HARD, draw, 1500).served] == 192


def test_it_never_serves_what_has_not_been_shown() -> None:
    """Rungs below the target in truth are served in few of many runs, at any time."""
    wrong = 0
    for seed in range(60):
        draw, state = random.Random(seed), start(SETTINGS)
        served = state.served
        for _ in range(400):
            state = compare(state, (0.85,) * 6 + (1.0,), draw)
            served = min(served, state.served)
        wrong += LADDER[served] < 576
    assert wrong <= 60 * 0.05 + 5


def test_it_returns_to_the_top_at_once_when_the_traffic_turns() -> None:
    draw = random.Random(0)
    state = settle(start(SETTINGS), EASY, draw, 400)
    comparisons = 0
    while state.served < len(LADDER) - 1:
        state = compare(state, HARD, draw)
        comparisons += 1
    assert comparisons < 30
    assert state.num_falls == 1
    assert all(rung.tally.count == 0 for rung in state.rungs), (
        "what was shown before was shown on other traffic"
    )
    state = settle(state, HARD, draw, 1500)
    assert LADDER[state.served] == 192
    state = settle(state, EASY, draw, 3000)
    assert LADDER[state.served] == 32, "and follows it back"


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("target", [0.5, 0.9, 0.98])
@pytest.mark.parametrize("part", [0.0, 0.7, 0.9])
@pytest.mark.parametrize("fractions", [False, True])
def test_no_rung_is_served_whose_upper_bound_lies_below_the_target(
    confidence: float, target: float, part: float, fractions: bool
) -> None:
    """From the moment at which the traffic turns. The top alone is served whatever its agreement is."""
    settings = QualitySettings(target_agreement=target, confidence=confidence, ladder=(64, 576))
    draw, state = random.Random(0), start(settings)
    while state.served:
        state = record(settings, state, [(0, 1.0)])
    comparisons = 0
    while not state.served:
        score = part * target if fractions else float(draw.random() < part * target)
        state = record(settings, state, [(0, score)])
        comparisons += 1
        assert state.served or interval(state.rungs[0].tally, confidence)[1] >= target
    assert state.num_falls == 1
    # Bets of the likelihood ratio gain the divergence with each comparison, about 0.005 in the hardest case; the
    # evidence of the trial, of some hundred comparisons, has to be made up for.
    assert comparisons < 5000


def test_a_suspicion_follows_a_disagreement_until_it_is_settled() -> None:
    state = settle(start(SETTINGS), HARD, random.Random(2), 1500)
    served = state.served
    for _ in range(100):
        state = record(SETTINGS, state, [(served, 1.0)])
    assert not state.suspects(0.9)
    state = record(SETTINGS, state, [(served, 0.0)])
    assert state.suspects(0.9)
    assert served in next_rungs(SETTINGS, state, top_reduces=False)
    for _ in range(40):
        state = record(SETTINGS, state, [(served, 1.0)])
    assert not state.suspects(0.9)


@pytest.mark.parametrize("seed", range(4))
def test_a_trial_whose_mean_passes_the_target_is_not_given_up(seed: int) -> None:
    """It takes many more comparisons than a rung without any disagreement, and would hardly end if begun anew."""
    agreements = (0.5, 0.6, 0.7, 0.7, 0.93, 0.93, 1.0)
    state = settle(start(SETTINGS), agreements, random.Random(seed), 6000)
    assert LADDER[state.served] == 192


def test_a_rung_that_failed_rests_ever_longer() -> None:
    draw, state = random.Random(0), start(SETTINGS)
    trials = []
    for _ in range(3000):
        before = state.rungs[0].trial
        state = compare(state, (0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 1.0), draw)
        if state.rungs[0].trial > before:
            trials.append(state.num_chosen)
    gaps = [after - before for before, after in pairwise(trials)]
    assert len(gaps) >= 3
    assert gaps[2] > 2 * gaps[0]
    assert LADDER[state.served] == 576


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(0, 1)), max_size=200))
def test_any_scores_leave_a_state_that_can_be_served(scores: list[tuple[int, float]]) -> None:
    state = start(SETTINGS)
    for index, score in scores:
        state = record(SETTINGS, state, [(index, score)])
        assert 0 <= state.served < len(LADDER)
        assert set(next_rungs(SETTINGS, state, top_reduces=False)) <= set(range(len(LADDER) - 1))


def test_second_answers_cost_their_share_of_tokens_at_most() -> None:
    settings = SETTINGS.model_copy(update={"share": 0.2, "max_tokens_per_minute": 10**9})
    allowance, spent, earned = Allowance(settings, 0.0), 0, 0
    draw = random.Random(0)
    for number in range(20000):
        allowance.earn(84)
        earned += 84
        suspects = number % 1000 > 950
        if draw.random() < allowance.share(float(number), suspects=suspects):
            allowance.spend(650, suspects=suspects)
            spent += 650
    assert 0.02 * earned < spent <= 0.03 * earned + 650


def test_tokens_are_set_aside_before_anything_is_tried() -> None:
    settings = SETTINGS.model_copy(update={"share": 0.2, "max_tokens_per_minute": 10**9})
    allowance = Allowance(settings, 0.0)
    requests = 0
    while not allowance.share(0.0, suspects=False):
        allowance.earn(600)
        requests += 1
    assert requests * 600 * 0.03 >= NUM_RESERVED * 576
    # On a suspicion so many answers of the full model can follow at once.
    answers = 0
    while allowance.share(0.0, suspects=True):
        allowance.spend(576, suspects=True)
        answers += 1
    assert answers >= NUM_RESERVED


def test_the_bound_for_a_minute() -> None:
    settings = SETTINGS.model_copy(update={"max_tokens_per_minute": 6000, "max_extra": 1.0, "share": 1.0})
    allowance, spent = Allowance(settings, 0.0), 0
    for second in range(1200):
        allowance.earn(50_000)
        while allowance.share(float(second), suspects=False):
            allowance.spend(500, suspects=False)
            spent += 500
    assert spent == pytest.approx(20 * 6000, rel=0.1)
