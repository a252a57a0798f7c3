"""Figures of each row, computed from the answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap, wilson
from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.suites import Row
from ficoco_vllm.benchmarks.accuracy.variants import NO_IMAGE, Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item


def summarise(
    wanted: Sequence[Row], items: Sequence[Item], store: Store, num_tokens: int, count: Callable[[Row], int]
) -> dict[str, Any]:
    """Figures of every row.

    Args:
        wanted: the rows.
        items: all questions.
        store: their answers.
        num_tokens: visual tokens of an unreduced image.
        count: returns the questions of each type of a row.

    Returns:
        `majority` by type, `rows`, and `warnings` in words.
    """
    by_kind = {
        kind: [item for item in items if item.kind == kind] for kind in dict.fromkeys(i.kind for i in items)
    }
    figures, warnings = [], []
    for row in wanted:
        questions = {kind: by_kind[kind][: count(row)] for kind in row.kinds}
        reference = _full_of(row.variant, store, questions)
        figures.append(_figures(row, questions, store, reference))
        if reference is not None:
            before, after = _replies(reference, questions, store), _replies(row.variant, questions, store)
            warnings += check(row.variant, before, after, num_tokens)
    return {"majority": _majority(by_kind), "warnings": sorted(set(warnings)), "rows": figures}


def _figures(
    row: Row, questions: Mapping[str, Sequence[Item]], store: Store, reference: Variant | None
) -> dict[str, Any]:
    variant = row.variant
    right = _right(variant, questions, store)
    replies = _replies(variant, questions, store)
    shares = {kind: sum(verdicts) / len(verdicts) for kind, verdicts in right.items()}
    figures: dict[str, Any] = {
        "table": row.table,
        "label": row.label,
        "method": variant.method,
        "site": variant.site,
        "keep": variant.keep,
        "settings": dict(variant.settings),
        "accuracy": _percent(sum(shares.values()) / len(shares)),
        "kinds": {
            kind: {
                "count": len(verdicts),
                "accuracy": _percent(shares[kind]),
                "interval": [_percent(bound) for bound in wilson(sum(verdicts), len(verdicts))],
                "right": "".join("01"[verdict] for verdict in verdicts),
            }
            for kind, verdicts in right.items()
        },
        "prompt_tokens": round(sum(reply.prompt_tokens for reply in replies) / len(replies), 2),
    }
    if reference is not None and reference.key != variant.key:
        before = _replies(reference, questions, store)
        change, low, high = paired_bootstrap(_right(reference, questions, store), right)
        same = sum(a.text == b.text for a, b in zip(before, replies, strict=True))
        figures["against_full"] = {
            "change": _percent(change),
            "interval": [_percent(low), _percent(high)],
            "agreement": _percent(same / len(replies)),
        }
    return figures


def check(variant: Variant, before: Sequence[Reply], after: Sequence[Reply], num_tokens: int) -> list[str]:
    """Signs that a server did not reduce as requested, a line for each.

    Args:
        variant: of the request.
        before: answers to some questions with all visual tokens.
        after: answers of the variant to the same questions, in the same order.
        num_tokens: visual tokens of an unreduced image.
    """
    if not after or variant.method is None or variant.keep is None or variant.keep >= num_tokens:
        return []
    warnings = []
    if variant.site == "tower":
        saved = {a.prompt_tokens - b.prompt_tokens for a, b in zip(before, after, strict=True)}
        if saved != {num_tokens - variant.keep}:
            warnings.append(
                f"{variant.key}: prompts are shorter by {sorted(saved)} tokens, not by {num_tokens - variant.keep}: "
                "the server does not reduce as requested"
            )
    if all(a.likely == b.likely and a.text == b.text for a, b in zip(before, after, strict=True)):
        warnings.append(
            f"{variant.key}: every answer and log-probability equals that of all visual tokens: "
            "the server does not reduce"
        )
    return warnings


def _full_of(variant: Variant, store: Store, questions: Mapping[str, Sequence[Item]]) -> Variant | None:
    """The variant with all visual tokens to compare with: on the same server, else the nearest to it."""
    if variant.label == NO_IMAGE:
        return None
    items = [item for some in questions.values() for item in some]
    for site in dict.fromkeys((variant.site, "decoder", "tower")):
        candidate = full(site)
        if all((candidate.key, item.name) in store for item in items):
            return candidate
    return None


def _right(variant: Variant, questions: Mapping[str, Sequence[Item]], store: Store) -> dict[str, list[bool]]:
    return {
        kind: [store[variant.key, item.name].text == item.answer for item in items]
        for kind, items in questions.items()
    }


def _replies(variant: Variant, questions: Mapping[str, Sequence[Item]], store: Store) -> list[Reply]:
    return [store[variant.key, item.name] for items in questions.values() for item in items]


def _majority(by_kind: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """Accuracy of always giving the most frequent answer of a type."""
    return {
        kind: _percent(Counter(item.answer for item in items).most_common(1)[0][1] / len(items))
        for kind, items in by_kind.items()
    }


def _percent(share: float) -> float:
    return round(100 * share, 1)
