"""Figures of each row, computed from the answers."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.benchmarks.accuracy.statistics import paired_bootstrap, wilson
from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.suites import Row
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item


def summarise(wanted: Sequence[Row], items: Sequence[Item], store: Store, num_tokens: int) -> dict[str, Any]:
    """Figures of all `rows`, `warnings` in words, and `majority`: accuracy of a type's most frequent answer.

    `num_tokens` counts visual tokens of an unreduced image.
    """
    figures, warnings = [], set[str]()
    for row in wanted:
        asked = [item for item in items if item.kind in row.kinds]
        before, after = _with_all_tokens(row.variant, asked, store), _replies(row.variant, asked, store)
        figures.append(_figures(row, asked, before, after))
        warnings.update(check(row.variant, before, after, num_tokens) if before else [])
    answers: dict[str, Counter[str | None]] = {}
    for item in items:
        answers.setdefault(item.kind, Counter())[item.answer] += 1
    majority = {kind: _percent(max(counts.values()) / counts.total()) for kind, counts in answers.items()}
    return {"majority": majority, "warnings": sorted(warnings), "rows": figures}


def _figures(
    row: Row, asked: Sequence[Item], before: Sequence[Reply] | None, after: Sequence[Reply]
) -> dict[str, Any]:
    """Figures of a row: `asked` are its questions, `before` the answers with all visual tokens, `after` its own."""
    right = _right(row, asked, after)
    shares = {kind: sum(verdicts) / len(verdicts) for kind, verdicts in right.items()}
    figures: dict[str, Any] = {
        "table": row.table,
        "label": row.label,
        "method": row.variant.method,
        "site": row.variant.site,
        "keep": row.variant.keep,
        "settings": dict(row.variant.settings),
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
        "prompt_tokens": round(sum(reply.prompt_tokens for reply in after) / len(after), 2),
    }
    if before is not None:
        change, low, high = paired_bootstrap(_right(row, asked, before), right)
        same = sum(a.text == b.text for a, b in zip(before, after, strict=True))
        figures["against_full"] = {
            "change": _percent(change),
            "interval": [_percent(low), _percent(high)],
            "agreement": _percent(same / len(after)),
        }
    return figures


def check(variant: Variant, before: Sequence[Reply], after: Sequence[Reply], num_tokens: int) -> list[str]:
    """Signs that a server did not reduce as requested, a line for each.

    `before` are the answers to some questions with all visual tokens, `num_tokens` of an image, and `after` those of
    the variant.
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


def _with_all_tokens(variant: Variant, asked: Sequence[Item], store: Store) -> list[Reply] | None:
    """Answers of all visual tokens to compare a method's with: of the same server, else the nearest to it."""
    if variant.method is None:
        return None
    for site in dict.fromkeys((variant.site, "decoder", "tower")):
        if all((full(site).key, item.name) in store for item in asked):
            return _replies(full(site), asked, store)
    return None


def _replies(variant: Variant, asked: Sequence[Item], store: Store) -> list[Reply]:
    return [store[variant.key, item.name] for item in asked]


def _right(row: Row, asked: Sequence[Item], replies: Sequence[Reply]) -> dict[str, list[bool]]:
    """Whether each answer is right, by type of question."""
    verdicts: dict[str, list[bool]] = {kind: [] for kind in row.kinds}
    for item, reply in zip(asked, replies, strict=True):
        verdicts[item.kind].append(reply.text == item.answer)
    return verdicts


def _percent(share: float) -> float:
    return round(100 * share, 1)
