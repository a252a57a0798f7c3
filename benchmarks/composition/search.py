"""Successive halving over compositions: many on few questions, few on many."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from benchmarks.composition.scoring import Score
from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item

Scores = Mapping[tuple[str, str], Score]
Ask = Callable[[Sequence[tuple[Variant, Item]]], Sequence[Score]]


@dataclass(frozen=True)
class Rung:
    """One round of the search.

    Attributes:
        keeps: budgets that are asked.
        count: questions of each type.
        survivors: how many variants go on.
    """

    keeps: tuple[int, ...]
    count: int
    survivors: int


@dataclass(frozen=True)
class Ranked:
    """One variant in one round.

    Attributes:
        variant: without a budget.
        logprob: mean log-probability of the right answer, types and budgets weighing the same.
        accuracy: share of questions answered right, the same way.
    """

    variant: Variant
    logprob: float
    accuracy: float


def at(variant: Variant, keep: int) -> Variant:
    """The variant with a budget."""
    return replace(variant, keep=keep)


def first_of_each(items: Sequence[Item], count: int) -> list[Item]:
    """The first questions of each type."""
    kinds = dict.fromkeys(item.kind for item in items)
    return [item for kind in kinds for item in [one for one in items if one.kind == kind][:count]]


def halve(
    variants: Sequence[Variant], items: Sequence[Item], rungs: Sequence[Rung], ask: Ask
) -> list[list[Ranked]]:
    """Run the rounds.

    Args:
        variants: without budgets.
        items: questions of the search, the same number of each type.
        rungs: in their order; a later one should ask at least what the one before it did.
        ask: scores questions; what was asked in an earlier round is not asked again.

    Returns:
        For each round its variants, the best first.
    """
    known: dict[tuple[str, str], Score] = {}
    contenders, rounds = list(variants), list[list[Ranked]]()
    for rung in rungs:
        asked = first_of_each(items, rung.count)
        jobs = [
            (at(variant, keep), item)
            for variant in contenders
            for keep in rung.keeps
            for item in asked
            if (at(variant, keep).key, item.name) not in known
        ]
        for (variant, item), score in zip(jobs, ask(jobs), strict=True):
            known[variant.key, item.name] = score
        ranked = [_rank(variant, rung.keeps, asked, known) for variant in contenders]
        rounds.append(sorted(ranked, key=lambda row: -row.logprob))
        contenders = [row.variant for row in rounds[-1][: rung.survivors]]
    return rounds


def _rank(variant: Variant, keeps: Sequence[int], items: Sequence[Item], known: Scores) -> Ranked:
    scores = [known[at(variant, keep).key, item.name] for keep in keeps for item in items]
    return Ranked(variant, fmean(s.logprob for s in scores), fmean(s.right for s in scores))
