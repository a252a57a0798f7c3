"""Intervals and tests compared with their textbook values and their nominal error rates."""

import numpy as np
import pytest

from ficoco_vllm.benchmarks.accuracy.statistics import (
    at_least,
    lower_bound,
    paired_bootstrap,
    sign_test,
    upper_bound,
    wilson,
)


def test_wilson_is_the_published_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_exact_bounds_have_closed_forms_at_the_ends() -> None:
    assert lower_bound(59, 59) == pytest.approx(0.05 ** (1 / 59), abs=1e-9)
    assert upper_bound(0, 59) == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-9)
    assert lower_bound(0, 10) == 0.0
    assert upper_bound(10, 10) == 1.0


@pytest.mark.parametrize("successes", [1, 7, 30, 49])
def test_exact_bound_is_where_the_tail_is_as_rare_as_said(successes: int) -> None:
    assert at_least(successes, 50, lower_bound(successes, 50)) == pytest.approx(0.05, abs=1e-6)


@pytest.mark.parametrize("share", [0.9, 0.95, 0.98])
def test_exact_bound_misses_no_more_often_than_said(share: float) -> None:
    samples = np.random.default_rng(0).binomial(80, share, size=4000)
    missed = np.mean([lower_bound(int(draw), 80) > share for draw in samples])
    assert missed <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_sign_test_counts_the_tails_of_a_fair_coin() -> None:
    assert sign_test(0, 0) == 1.0
    assert sign_test(5, 5) == 1.0
    assert sign_test(0, 10) == pytest.approx(2 / 1024)
    assert sign_test(1, 9) == pytest.approx(2 * 11 / 1024)


def test_bootstrap_equals_one_that_draws_every_question() -> None:
    rng = np.random.default_rng(1)
    full = {kind: list(rng.random(40) < 0.95) for kind in "ab"}
    reduced = {kind: list(rng.random(40) < share) for kind, share in zip("ab", (0.9, 0.5), strict=True)}
    rendered = []
    for _ in range(4000):
        changes = []
        for kind in full:
            index = rng.integers(0, 40, 40)
            changes.append(np.mean(np.array(reduced[kind])[index]) - np.mean(np.array(full[kind])[index]))
        rendered.append(np.mean(changes))
    change, low, high = paired_bootstrap(full, reduced)
    assert change == pytest.approx(
        np.mean([np.mean(reduced[kind]) - np.mean(full[kind]) for kind in full]), abs=1e-12
    )
    # A quantile of 4,000 samples with a standard deviation of 0.05 is accurate to about 0.003; both sides sample.
    assert (low, high) == pytest.approx(tuple(np.quantile(rendered, [0.025, 0.975])), abs=0.015)


def test_bootstrap_of_equal_answers_has_no_width() -> None:
    answers = {"a": [True, False, True]}
    assert paired_bootstrap(answers, answers) == (0.0, 0.0, 0.0)
