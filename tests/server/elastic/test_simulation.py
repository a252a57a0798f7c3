"""The controller on a simulated server (`plant.py`): it settles, it never runs away, it comes back."""

import pytest

from ficoco_vllm.server.elastic.settings import ElasticSettings
from tests.server.elastic.plant import Machine, Run, evenly, poisson, simulate

SETTINGS = ElasticSettings(floor=64, ceiling=288)
# KV: 22 prompts at the ceiling, 46 at the floor. Compute: 64 concurrent requests, prompts at 1 ms a token.
SCARCE_KV = Machine(kv_tokens=8000)
SLOW = Machine(kv_tokens=10**6, prefill_seconds=1e-3, max_running=64)


def run(
    rate: float, seconds: float, machine: Machine = SCARCE_KV, seed: int | None = None, **other: int
) -> Run:
    """A constant rate."""
    arrivals = evenly(lambda _: rate, seconds) if seed is None else poisson(lambda _: rate, seconds, seed)
    return simulate(SETTINGS, arrivals, seconds, machine=machine, **other)


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_under_light_load_it_stays_at_the_ceiling(seed: int | None) -> None:
    assert run(3, 600, seed=seed).range(0, 600) == {288}


@pytest.mark.parametrize("rate", [7, 8, 9, 10, 11])
def test_an_even_load_that_is_too_much_for_the_ceiling_settles_on_one_budget(rate: float) -> None:
    result = run(rate, 600)
    assert result.changes(120, 600) == 0
    (budget,) = result.range(120, 600)
    assert budget < 288
    assert result.longest_queue(300, 600) <= 1


@pytest.mark.parametrize("rate", [8, 9, 10])
def test_time_to_first_token_stays_bounded_where_the_ceiling_queues_without_end(rate: float) -> None:
    arrivals = [poisson(lambda _: rate, 600, seed=3) for _ in range(2)]
    elastic = simulate(SETTINGS, arrivals[0], 600, machine=SCARCE_KV)
    fixed = simulate(None, arrivals[1], 600, machine=SCARCE_KV, fixed=288)
    assert fixed.longest_queue(500, 600) > 1.5 * fixed.longest_queue(200, 300) > 100
    assert elastic.longest_queue(100, 600) < 30
    late = elastic.ttft(100, 590)
    assert late[int(0.99 * len(late))] < 2


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("rate", [5, 6, 7, 8])
def test_chance_arrivals_hardly_move_it_once_it_has_settled(rate: float, seed: int) -> None:
    result = run(rate, 1200, seed=seed)
    assert result.changes(300, 1200) <= 12
    assert len(result.range(300, 1200)) <= 4


@pytest.mark.parametrize("rate", [20, 40])
def test_it_reaches_the_floor_under_overload_and_stays_there(rate: float) -> None:
    assert run(rate, 300).range(30, 300) == {64}


@pytest.mark.parametrize("rate", [3, 4, 5])
@pytest.mark.parametrize("seed", [None, 1])
def test_it_falls_on_the_queue_alone_and_tries_the_failing_level_ever_less_often(
    rate: float, seed: int | None
) -> None:
    result = run(rate, 3000, SLOW, seed=seed)
    arrivals = evenly(lambda _: rate, 3000) if seed is None else poisson(lambda _: rate, 3000, seed)
    fixed = simulate(None, arrivals, 3000, machine=SLOW, fixed=288)
    assert fixed.longest_queue(2400, 3000) > 1000
    assert result.longest_queue(300, 3000) < 100
    assert result.changes(1500, 3000) < 0.7 * result.changes(0, 1500)
    # At most one attempt in each `max_release_seconds`, with the way down and back up again.
    assert result.changes(2100, 3000) <= 3 * 8


def test_answers_that_take_a_minute_and_more_do_not_make_it_swing() -> None:
    machine = Machine(kv_tokens=20000)
    for rate in (0.5, 0.6, 0.7):
        result = run(rate, 3000, machine, seed=1, num_output=1000)
        assert result.changes(1500, 3000) <= 3 * 8, rate
        assert result.longest_queue(300, 3000) < 15


def test_after_the_overload_it_returns_to_the_ceiling() -> None:
    def rate(time: float) -> float:
        return 20 if 60 <= time < 120 else 2

    for seed in (1, 2, 3):
        result = simulate(SETTINGS, poisson(rate, 400, seed), 400, machine=SCARCE_KV)
        assert result.range(0, 60) == {288}
        assert 64 in result.range(60, 120)
        drained = next(time for time, waiting in result.waiting if time > 120 and waiting == 0)
        back = drained + sum((10, 10, 10, 20)) + 30
        assert back < 300
        assert result.range(back, 400) == {288}


def test_without_requests_it_returns_to_the_ceiling_too() -> None:
    def rate(time: float) -> float:
        return 20 if time < 60 else 0

    result = simulate(SETTINGS, evenly(rate, 300), 300, machine=SCARCE_KV)
    assert 64 in result.range(0, 60)
    assert result.range(250, 300) == {288}
