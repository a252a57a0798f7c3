"""Comparison of a run with a committed one, question by question."""

from collections.abc import Mapping
from typing import Any

from ficoco_vllm.benchmarks.accuracy.statistics import sign_test

# Level of the sign test of each row. With about fifty rows, chance alone causes a warning in one of twenty runs.
LEVEL = 0.001


def regressions(result: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """Rows that answer fewer questions right than the same rows of a reference do, a line for each.

    Only questions of both runs count. The two answers to each question are compared, so a few dozen questions are
    enough.

    Raises:
        ValueError: the runs cannot be compared.
    """
    for field in ("model", "seed", "workload", "num_tokens"):
        if result[field] != reference[field]:
            raise ValueError(
                f"{field} = {result[field]!r} is not that of the reference, {reference[field]!r}"
            )
    known = {_place(row): row["kinds"] for row in reference["rows"]}
    regressed = []
    for row in result["rows"]:
        before, after = known.get(_place(row), {}), row["kinds"]
        pairs = [
            pair
            for kind in before.keys() & after.keys()
            for pair in zip(before[kind]["right"], after[kind]["right"], strict=False)
        ]
        better, worse = pairs.count(("0", "1")), pairs.count(("1", "0"))
        if worse > better and sign_test(better, worse) < LEVEL:
            place = f"{row['table']}, {row['label']}, {row['keep'] or 'all'} tokens"
            regressed.append(
                f"{place}: of {len(pairs)} questions {worse} are wrong now and {better} right that were not"
            )
    return regressed


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["table"], row["label"], row["site"], row["keep"]
