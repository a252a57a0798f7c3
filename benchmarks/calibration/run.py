"""Replay a user's questions against the full model and reduced ones; find the smallest budget that still agrees."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint, pairs, replay
from ficoco_vllm.benchmarks.accuracy.host import CONCURRENCY, Host, endpoint
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.summary import check
from ficoco_vllm.benchmarks.accuracy.variants import SITES, Variant, full, site_of
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.calibration.divergence import divergence
from ficoco_vllm.benchmarks.calibration.kept import EXPLAINS, kept_patches
from ficoco_vllm.benchmarks.calibration.savings import first_token_ratio, kv_saving
from ficoco_vllm.benchmarks.calibration.search import FIRST, Ask, Outcome, certify, needed, search
from ficoco_vllm.benchmarks.harness.results import environment

BUDGETS = (288, 192, 144, 96, 64, 48, 32, 16)
SEARCH_SHARE = 1 / 4
NUM_TIMED = 6
NUM_TWICE = 64
NUM_WORST = 12
NUM_LOGPROBS = 20


@dataclass(frozen=True)
class Settings:
    """Goal and means of a calibration.

    Attributes:
        target: share of answers that must equal the full model's.
        answers: JSONL file; a run that was cut off goes on from it.
        budgets: visual tokens kept, candidates.
        seed: of the order of the questions.
    """

    methods: tuple[str, ...]
    target: float
    config: Mapping[str, Any]
    answers: Path
    host: Host
    budgets: tuple[int, ...] = BUDGETS
    confidence: float = 0.95
    max_tokens: int = 16
    seed: int = 0
    concurrency: int = CONCURRENCY

    def __post_init__(self) -> None:
        if not 0.5 <= self.target < 1.0:
            raise ValueError(f"target_agreement = {self.target} is not allowed; allowed: 0.5 to below 1")
        if not 0.5 <= self.confidence < 1.0:
            raise ValueError(f"confidence = {self.confidence} is not allowed; allowed: 0.5 to below 1")
        most = self.host.num_tokens - 1
        wrong = [keep for keep in self.budgets if not 1 <= keep <= most]
        if wrong:
            raise ValueError(f"budgets = {wrong[0]} is not allowed; allowed: 1 to {most}")
        for method in self.methods:
            site_of(method)


@dataclass(frozen=True)
class Replayed:
    """Questions, split, with their answers.

    Attributes:
        fresh: questions of the certificate.
    """

    endpoint: Endpoint
    store: Store
    concurrency: int
    searched: list[Item]
    fresh: list[Item]

    def ask(self, variants: Sequence[Variant], items: Sequence[Item], label: str) -> None:
        """Have questions answered that have not been yet."""
        replay(self.endpoint, pairs(variants, items), self.store, self.concurrency, label)

    def agreeing(self, variant: Variant, items: Sequence[Item]) -> int:
        """Questions that a variant answers as the full model does."""
        reference = full(variant.site)
        return sum(
            self.store[variant.key, item.name].text == self.store[reference.key, item.name].text
            for item in items
        )

    def asker(self, method: str, items: Sequence[Item]) -> Ask:
        """The search's view of some questions."""
        site = site_of(method)

        def ask(budgets: Sequence[int], n: int) -> dict[int, int]:
            variants = {keep: Variant(method, site, method, keep) for keep in budgets}
            self.ask([full(site), *variants.values()], items[:n], f"{method} {','.join(map(str, budgets))}")
            return {keep: self.agreeing(variant, items[:n]) for keep, variant in variants.items()}

        return ask


def split(items: Sequence[Item], target: float, confidence: float) -> tuple[list[Item], list[Item]]:
    """Questions of the search, and fresh ones for the certificate.

    Raises:
        ValueError: too few to show the target even if all answers agree.
    """
    least = needed(target, confidence)
    at_search = min(max(FIRST, round(len(items) * SEARCH_SHARE)), len(items) - least)
    if at_search < FIRST:
        raise ValueError(
            f"--data holds {len(items)} questions, too few to show an agreement of {target} with {confidence:.0%} "
            f"confidence; allowed: at least {least + FIRST}, or a lower --target-agreement"
        )
    return list(items[:at_search]), list(items[at_search:])


def calibrate(settings: Settings, items: Sequence[Item]) -> dict[str, Any]:
    """Find the smallest safe budget of each method.

    Returns:
        The report as it is written to JSON.

    Raises:
        ValueError: too few questions, or the answers on disk are those of another run.
        RuntimeError: a server does not start.
        openai.APIError: a server refuses a question.
    """
    searched, fresh = split(items, settings.target, settings.confidence)
    identity = {
        **settings.host.identity,
        "workload": [item.name for item in items],
        "tokens": settings.max_tokens,
    }
    reports = []
    with Store(settings.answers, identity) as store:
        for site in SITES:
            methods = [method for method in settings.methods if site_of(method) == site]
            if not methods:
                continue
            fields = {"max_tokens": settings.max_tokens, "num_logprobs": NUM_LOGPROBS}
            host = replace(settings.host, arguments=(*settings.host.arguments, *EXPLAINS))
            with endpoint(host, site, [], **fields) as server:
                run = Replayed(server, store, settings.concurrency, searched, fresh)
                reports += _of_site(settings, run, methods)
    return {
        "schema": 1,
        "environment": environment(),
        "model": settings.host.model or "demo",
        "target_agreement": settings.target,
        "confidence": settings.confidence,
        "questions": {"search": len(searched), "certificate": len(fresh)},
        "methods": reports,
    }


def _of_site(settings: Settings, run: Replayed, methods: Sequence[str]) -> list[dict[str, Any]]:
    site = site_of(methods[0])
    reference = full(site)
    again = replace(reference, label=f"{reference.label} again")
    twice = run.fresh[:NUM_TWICE]
    run.ask([reference, again], twice, f"{site}: all tokens, twice")
    with_itself = run.agreeing(again, twice) / len(twice)
    outcomes: dict[str, Outcome] = {}
    for method in methods:
        asker = run.asker(method, run.searched)
        candidate, seen = search(settings.budgets, settings.target, len(run.searched), asker)
        if candidate is None:
            outcomes[method] = Outcome(None, None, seen)
            continue
        fresh = run.asker(method, run.fresh)
        safe, tested = certify(
            settings.budgets, candidate, settings.target, len(run.fresh), fresh, settings.confidence
        )
        outcomes[method] = Outcome(safe, candidate, seen, tested)
    return [_report(settings, run, method, outcome, with_itself) for method, outcome in outcomes.items()]


def _report(
    settings: Settings, run: Replayed, method: str, outcome: Outcome, with_itself: float
) -> dict[str, Any]:
    report: dict[str, Any] = {
        "method": method,
        "site": site_of(method),
        "full_agrees_with_itself": round(with_itself, 4),
        "candidate": outcome.candidate,
        "searched": [
            {"keep": keep, "agreeing": a, "count": n} for keep, (a, n) in sorted(outcome.searched.items())
        ],
        "tested": [
            {
                "keep": test.keep,
                "agreeing": test.agreeing,
                "count": test.count,
                "at_least": round(test.bound, 4),
            }
            for test in outcome.tested
        ],
        "safe": None,
        "warnings": _warnings(run, method, outcome),
        **_disagreements(run, method, outcome),
    }
    if outcome.safe is None:
        return report
    variant = Variant(method, site_of(method), method, outcome.safe.keep)
    reference = full(variant.site)
    moved = sorted(
        divergence(run.store[reference.key, item.name].likely, run.store[variant.key, item.name].likely)
        for item in run.fresh
    )
    text = statistics.fmean(run.store[reference.key, item.name].prompt_tokens for item in run.fresh)
    timed = first_token_ratio(run.endpoint, [reference, variant], run.fresh[: NUM_TIMED + 1], settings.seed)
    model = settings.host.model or ""
    num_tokens = settings.host.num_tokens
    report["safe"] = {
        "keep": outcome.safe.keep,
        "agreement": round(outcome.safe.agreeing / outcome.safe.count, 4),
        "at_least": round(outcome.safe.bound, 4),
        "first_token_divergence": {
            "mean": round(statistics.fmean(moved), 5),
            "p95": round(moved[int(0.95 * (len(moved) - 1))], 5),
        },
        "kv_cache": kv_saving(settings.config, variant, num_tokens, text - num_tokens),
        "first_token": {key.split("/")[0]: value for key, value in timed.items()},
        "serve": " ".join(
            filter(
                None,
                ["ficoco-vllm serve", model, f"--ficoco-method {method} --ficoco-keep {outcome.safe.keep}"],
            )
        ),
    }
    return report


def _warnings(run: Replayed, method: str, outcome: Outcome) -> list[str]:
    """Signs that the server did not reduce in the search, in which case it would agree with itself."""
    site = site_of(method)
    lines = []
    for keep, (_, count) in sorted(outcome.searched.items()):
        variant, items = Variant(method, site, method, keep), run.searched[:count]
        before, after = (
            [run.store[answering.key, item.name] for item in items] for answering in (full(site), variant)
        )
        lines += check(variant, before, after, run.endpoint.num_tokens)
    return lines


def _disagreements(run: Replayed, method: str, outcome: Outcome) -> dict[str, Any]:
    """The worst disagreements at the safe budget, or where none is safe at the largest one that was tested.

    Returns:
        `worst_keep`, the budget; `worst_of`, whether its questions are those of the certificate or of the search; and
        `worst`, the questions that are answered otherwise than by the full model, the surest of its answers first.
    """
    if outcome.tested:
        last = outcome.safe or outcome.tested[0]
        keep, part, items = last.keep, "certificate", run.fresh
    else:
        keep, part = max(outcome.searched), "search"
        items = run.searched[: outcome.searched[keep][1]]
    variant = Variant(method, site_of(method), method, keep)
    reference = full(variant.site)
    rows = []
    for item in items:
        before, after = run.store[reference.key, item.name], run.store[variant.key, item.name]
        if before.text != after.text:
            moved = round(divergence(before.likely, after.likely), 4)
            rows.append((moved, item, {"item": item.name, "full": before.text, "reduced": after.text}))
    rows.sort(key=lambda row: -row[0])
    return {
        "worst_keep": keep,
        "worst_of": part,
        "worst": [
            {**texts, "divergence": moved, "patches": kept_patches(run.endpoint, variant, item)}
            for moved, item, texts in rows[:NUM_WORST]
        ],
    }
