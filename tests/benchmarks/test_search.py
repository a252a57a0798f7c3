"""Simulation of the search and its certificate: cost, results and error rate."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.calibration.run import BUDGETS, split
from ficoco_vllm.benchmarks.calibration.search import certify, needed, search

TARGET = 0.9
# Agreement by budget: 48 is the smallest that truly reaches the target.
TRUTH = {288: 0.999, 192: 0.995, 144: 0.99, 96: 0.97, 64: 0.96, 48: 0.95, 32: 0.8, 16: 0.4}


class Simulated:
    """Questions that each budget agrees on with its own probability; the first n of them are always the same."""

    def __init__(self, truth: Mapping[int, float], total: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.agree = {keep: rng.random(total) < share for keep, share in truth.items()}
        self.num_questions: dict[int, int] = dict.fromkeys(truth, 0)

    def __call__(self, budgets: Sequence[int], n: int) -> dict[int, int]:
        for keep in budgets:
            self.num_questions[keep] = max(self.num_questions[keep], n)
        return {keep: int(self.agree[keep][:n].sum()) for keep in budgets}


def test_halving_asks_less_than_a_grid_and_finds_the_neighbourhood() -> None:
    counts, result = [], []
    for seed in range(100):
        simulated = Simulated(TRUTH, 128, seed)
        candidate, _ = search(BUDGETS, TARGET, 128, simulated)
        result.append(candidate)
        counts.append(sum(simulated.num_questions.values()))
    assert np.mean([keep in (32, 48, 64) for keep in result]) > 0.95
    assert np.mean(counts) < 0.6 * 128 * len(BUDGETS)


def test_search_takes_back_what_was_put_aside() -> None:
    # The small half looks well on the first 16 questions and fails on the next.
    class Late(Simulated):
        def __call__(self, budgets: Sequence[int], n: int) -> dict[int, int]:
            answers = super().__call__(budgets, n)
            return {keep: n if keep >= 144 or n <= 16 else n // 2 for keep in answers}

    candidate, seen = search(BUDGETS, TARGET, 128, Late(TRUTH, 128, 0))
    assert candidate == 144
    assert seen[16] == (16, 32)


def test_search_says_when_nothing_is_enough() -> None:
    candidate, seen = search(BUDGETS, TARGET, 64, Simulated(dict.fromkeys(BUDGETS, 0.3), 64, 0))
    assert candidate is None
    assert set(seen) == set(BUDGETS)


def test_certificate_errs_no_more_often_than_said() -> None:
    """A budget that is truly below the target passes in at most 5% of the runs, search and all."""
    truth = dict.fromkeys(BUDGETS, 0.89)  # all just below the target: the worst case
    passed = 0
    for seed in range(400):
        candidate, _ = search(BUDGETS, TARGET, 64, Simulated(truth, 64, seed))
        if candidate is not None:
            safe, _ = certify(BUDGETS, candidate, TARGET, 200, Simulated(truth, 200, 10_000 + seed))
            passed += safe is not None
    assert passed / 400 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_certificate_ends_at_the_first_failure() -> None:
    simulated = Simulated(TRUTH, 300, 0)
    safe, tested = certify(BUDGETS, 48, TARGET, 300, simulated)
    assert [test.keep for test in tested] == [96, 64, 48, 32]
    assert safe is not None
    assert safe.keep == 48
    assert tested[-1].bound < TARGET <= safe.bound
    assert simulated.num_questions[16] == 0


@pytest.mark.parametrize(("target", "count"), [(0.9, 29), (0.95, 59), (0.98, 149)])
def test_questions_needed(target: float, count: int) -> None:
    assert needed(target) == count
    items = [Item(str(index), "own", "?", b"") for index in range(count + 16)]
    searched, fresh = split(items, target, 0.95)
    assert len(fresh) >= count
    assert len(searched) + len(fresh) == len(items)
    with pytest.raises(ValueError, match=f"allowed: at least {count + 16}"):
        split(items[:-1], target, 0.95)
