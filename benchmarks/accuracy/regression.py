"""Comparison of a run with a committed one, question by question."""

from collections.abc import Iterable, Mapping
from typing import Any

from ficoco_vllm.benchmarks.accuracy.statistics import sign_test

# With some fifty rows in a comparison, chance alone gives a warning in one of twenty runs.
LEVEL = 0.001


def regressions(result: Mapping[str, Any], reference: Mapping[str, Any], level: float = LEVEL) -> list[str]:
    """Rows that answer fewer questions right than the same rows of a reference do, a line for each.

    Only questions of both runs count. Both answers to a question are compared with each other, so that a few dozen
    questions are enough.

    Args:
        result: of a run.
        reference: of another run with the same model, seed and visual tokens; it may have more or fewer questions.
        level: of the sign test, for each row alone.

    Raises:
        ValueError: the runs cannot be compared.
    """
    for field in ("model", "seed", "workload", "num_tokens"):
        if result[field] != reference[field]:
            raise ValueError(
                f"{field} = {result[field]!r} is not that of the reference, {reference[field]!r}"
            )
    known = {_name(row): row for row in reference["rows"]}
    regressed = []
    for row in result["rows"]:
        before = known.get(_name(row))
        if before is None:
            continue
        pairs = list(_pairs(before["kinds"], row["kinds"]))
        better, worse = pairs.count(("0", "1")), pairs.count(("1", "0"))
        if worse > better and sign_test(better, worse) < level:
            place = f"{row['table']}, {row['label']}, {row['keep'] or 'all'} tokens"
            regressed.append(
                f"{place}: of {len(pairs)} questions {worse} are wrong now and {better} right that were not"
            )
    return regressed


def _name(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["table"], row["label"], row["site"], row["keep"]


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for kind in before.keys() & after.keys():
        yield from zip(before[kind]["right"], after[kind]["right"], strict=False)
