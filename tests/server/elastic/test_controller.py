"""The control law alone, under various loads."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ficoco_vllm.server.elastic.controller import MAX_PRESSURE, State, measure, start, step
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.load.reports import Load

SETTINGS = ElasticSettings(floor=64, ceiling=288)
TOP = len(SETTINGS.budgets) - 1

loads = st.builds(Load, st.floats(0, 1), st.integers(0, 500), st.integers(0, 5000), st.integers(0, 100))
reports = st.lists(st.tuples(st.floats(0, 100), loads), max_size=60)


def follow(state: State, load: Load, seconds: float, interval: float = 0.25) -> State:
    """The same load for a while."""
    begin = state.time_seconds
    for tick in range(1, round(seconds / interval) + 1):
        state = step(SETTINGS, state, load, begin + tick * interval)
    return state


@given(reports)
def test_whatever_comes_the_level_moves_by_one_within_its_bounds_and_never_too_soon(
    series: list[tuple[float, Load]],
) -> None:
    state, now = start(SETTINGS, 0.0), 0.0
    for elapsed, load in series:
        now += elapsed
        after = step(SETTINGS, state, load, now)
        assert 0 <= after.level <= TOP
        assert 0 <= after.pressure <= MAX_PRESSURE
        assert all(
            SETTINGS.release_seconds <= hold <= SETTINGS.max_release_seconds for hold in after.hold_seconds
        )
        moved = after.level - state.level
        since = now - state.changed_seconds
        assert abs(moved) <= 1
        if moved < 0:
            assert since >= SETTINGS.attack_seconds
            assert after.pressure > 1
        if moved > 0:
            assert since >= SETTINGS.release_seconds
            growth = SETTINGS.budgets[after.level] / SETTINGS.budgets[state.level]
            assert after.pressure * growth <= 1 - SETTINGS.hysteresis
        state = after


@given(reports, loads, st.floats(0, 1), st.integers(0, 100), st.integers(0, 100), st.floats(0.01, 100))
def test_more_load_never_gives_a_larger_budget(
    series: list[tuple[float, Load]], load: Load, usage: float, waiting: int, preempted: int, elapsed: float
) -> None:
    state, now = start(SETTINGS, 0.0), 0.0
    for before, earlier in series:
        now += before
        state = step(SETTINGS, state, earlier, now)
    heavier = replace(
        load,
        kv_usage=max(load.kv_usage, usage),
        num_waiting=load.num_waiting + waiting,
        num_preempted=load.num_preempted + preempted,
    )
    light = step(SETTINGS, state, load, now + elapsed)
    heavy = step(SETTINGS, state, heavier, now + elapsed)
    assert heavy.pressure >= light.pressure
    assert heavy.level <= light.level


def test_a_report_that_is_not_newer_changes_nothing() -> None:
    state = follow(start(SETTINGS, 0.0), Load(0.9, 5, 5), 10)
    assert step(SETTINGS, state, Load(1.0, 1, 99), state.time_seconds) == state
    assert step(SETTINGS, state, Load(), state.time_seconds - 1) == state


@pytest.mark.parametrize(
    ("load", "pressure"),
    [
        (Load(), 0.0),
        (Load(0.8, 10, 0), 1.0),
        # Ten run in 60% of the cache; all fifteen would take 90% of it.
        (Load(0.6, 10, 5), 0.5 / 0.25),
        (Load(0.9, 10, 1), 0.9 * 1.1 / 0.8),
        (Load(0.04, 8, 2), 1.0),
        (Load(0.04, 8, 0, 2), 1.0),
        (Load(0.0, 0, 1), MAX_PRESSURE),
        (Load(1.0, 1, 1000), MAX_PRESSURE),
    ],
)
def test_pressure_is_demand_for_kv_or_the_queue_relative_to_their_targets(
    load: Load, pressure: float
) -> None:
    assert measure(SETTINGS, load) == pytest.approx(pressure)


def test_a_long_queue_takes_it_to_the_floor_within_seconds() -> None:
    state = follow(start(SETTINGS, 0.0), Load(1.0, 10, 50), 6)
    assert state.level == 0


def test_the_queue_counts_also_while_the_cache_is_nearly_empty() -> None:
    assert follow(start(SETTINGS, 0.0), Load(0.05, 8, 8), 10).level == 0


def test_just_above_the_target_it_falls_slowly() -> None:
    nearly = Load(0.84, 10, 0)  # 5% above
    assert follow(start(SETTINGS, 0.0), nearly, 15).level == TOP
    assert follow(start(SETTINGS, 0.0), nearly, 30).level == TOP - 1


def test_a_burst_that_is_gone_after_a_moment_changes_nothing() -> None:
    state = follow(start(SETTINGS, 0.0), Load(0.3, 5, 0), 60)
    state = follow(state, Load(0.5, 5, 5), 0.25)
    assert follow(state, Load(0.5, 10, 0), 60).level == TOP


def test_it_rises_step_by_step_and_only_where_the_next_level_would_fit() -> None:
    state = follow(start(SETTINGS, 0.0), Load(1.0, 10, 50), 10)
    # 45% in use at 64 tokens are foreseen to be 65% at 93, and 0.65 is within 0.9 of 0.8; 0.53 is not: 0.77 is not.
    fits, does_not = Load(0.45, 10, 0), Load(0.53, 10, 0)
    assert follow(state, does_not, 600).level == 0
    after = follow(state, fits, 14)
    assert after.level == 1
    assert follow(state, Load(), 4 * SETTINGS.release_seconds + 25).level == TOP


def test_a_level_that_failed_is_tried_again_later_each_time_and_sooner_after_a_pause() -> None:
    state, pauses = start(SETTINGS, 0.0), []
    for _ in range(8):
        while state.level == TOP:
            state = follow(state, Load(0.1, 8, 8), 0.25)
        fallen = state.time_seconds
        while state.level < TOP:
            state = follow(state, Load(0.1, 8, 0), 0.25)
        pauses.append(state.time_seconds - fallen)
    assert pauses == sorted(pauses)
    assert pauses[0] == pytest.approx(2 * SETTINGS.release_seconds, abs=5)
    assert pauses[-1] == pytest.approx(SETTINGS.max_release_seconds, abs=5)
    state = follow(state, Load(), SETTINGS.release_seconds + 1)
    assert set(state.hold_seconds) == {SETTINGS.release_seconds}


def test_several_engines_count_as_one() -> None:
    assert Load.of_engines([]) == Load()
    both = Load.of_engines([Load(0.9, 10, 4, 1), Load(0.1, 2, 0)])
    assert both == Load(0.5, 12, 4, 1)
