"""The smallest budget that agrees often enough: searched on one part of the questions, certified on another.

The search halves: all budgets answer a few questions; those that certainly agree too rarely are dropped, and of the
others the smaller half answers twice as many, and so on. The larger half is set aside and taken back only if
everything smaller fails. The candidate was chosen by its luck as much as by its merit, so its own figures do not
count: budgets around it are tested on questions that the search never saw, the largest first, each at the full level,
until one fails. A fixed order that ends at the first failure needs no correction for several tests.

Sources: Jamieson and Talwalkar, AISTATS 2016 (successive halving); Maurer, Hothorn and Lehmacher, 1995 (fixed order).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ficoco_vllm.benchmarks.accuracy.statistics import CONFIDENCE, lower_bound, upper_bound

FIRST = 16
# Sure enough to stop asking a budget; a wrong stop only costs a larger budget, not safety.
DROP_CONFIDENCE = 0.9

Seen = dict[int, tuple[int, int]]
# (budgets, n) -> how many of the first n questions each budget answers as the full model does.
Ask = Callable[[Sequence[int], int], Mapping[int, int]]


@dataclass(frozen=True)
class Tested:
    """Answers of one budget in the certificate that agree with the full model's, and the lower bound of their share."""

    keep: int
    agreeing: int
    count: int
    bound: float


def needed(target: float, confidence: float = CONFIDENCE) -> int:
    """Questions without a single disagreement that are needed to show a target."""
    return math.ceil(math.log(1 - confidence) / math.log(target))


def search(budgets: Sequence[int], target: float, total: int, ask: Ask) -> tuple[int | None, Seen]:
    """The smallest budget that seems to reach the target agreement, or None, and what was seen of each budget."""
    seen: Seen = {}
    contenders, aside = sorted(budgets), list[int]()
    n = min(FIRST, total)
    while contenders:
        seen |= {keep: (agreeing, n) for keep, agreeing in ask(contenders, n).items()}
        contenders = [keep for keep in contenders if upper_bound(*seen[keep], DROP_CONFIDENCE) >= target]
        reached = [keep for keep in contenders if seen[keep][0] >= target * n]
        if n == total and reached:
            return min(reached), seen
        if n == total or not contenders:
            contenders, aside = aside[:2], aside[2:]
            continue  # with as many questions as the ones that failed
        half = max(2, math.ceil(len(contenders) / 2))
        contenders, aside = contenders[:half], sorted([*contenders[half:], *aside])
        n = min(2 * n, total)
    return None, seen


def certify(
    budgets: Sequence[int],
    candidate: int | None,
    target: float,
    total: int,
    ask: Ask,
    confidence: float = CONFIDENCE,
) -> tuple[Tested | None, tuple[Tested, ...]]:
    """The smallest budget that passes a test, or None, and all tests; none without a candidate.

    Budgets around it answer fresh questions, the largest first, until one fails.
    """
    order, safe, tested = sorted(budgets), None, list[Tested]()
    if candidate is None:
        return safe, ()
    place = order.index(candidate)
    for keep in reversed(order[max(0, place - 1) : place + 3]):
        agreeing = ask([keep], total)[keep]
        tested.append(Tested(keep, agreeing, total, lower_bound(agreeing, total, confidence)))
        if tested[-1].bound < target:
            break
        safe = tested[-1]
    return safe, tuple(tested)
