"""Replay a user's questions against the full model and reduced ones; find the smallest budget that still agrees."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import CONCURRENCY, Endpoint, Host, endpoint, pairs, replay
from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.summary import check
from ficoco_vllm.benchmarks.accuracy.variants import SITES, Site, Variant, full, server_method, site_of
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.calibration.effects import (
    EXPLAINS,
    divergence,
    first_token_ratio,
    kept_patches,
    kv_saving,
)
from ficoco_vllm.benchmarks.calibration.search import FIRST, Ask, Outcome, certify, needed, search
from ficoco_vllm.benchmarks.harness.results import environment

BUDGETS = (288, 192, 144, 96, 64, 48, 32, 16)
SEARCH_SHARE = 1 / 4
NUM_TIMED, NUM_TWICE, NUM_WORST = 6, 64, 12
NUM_LOGPROBS = 20


@dataclass(frozen=True)
class Settings:
    """Goal and means of a calibration.

    Attributes:
        target: share of answers that must equal the full model's.
        answers: JSONL file; an interrupted run continues from it.
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
        for name, share in (("target_agreement", self.target), ("confidence", self.confidence)):
            if not 0.5 <= share < 1.0:
                raise ValueError(f"{name} = {share} is not allowed; allowed: 0.5 to below 1")
        most = self.host.num_tokens - 1
        wrong = [keep for keep in self.budgets if not 1 <= keep <= most]
        if wrong:
            raise ValueError(f"budgets = {wrong[0]} is not allowed; allowed: 1 to {most}")
        for method in self.methods:
            site_of(method)


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
    workload = {"workload": [item.name for item in items], "tokens": settings.max_tokens}
    host = replace(settings.host, arguments=(*settings.host.arguments, *EXPLAINS))
    fields = {"max_tokens": settings.max_tokens, "num_logprobs": NUM_LOGPROBS}
    reports = []
    with Store(settings.answers, {**settings.host.identity, **workload}) as store:
        for site in SITES:
            of_site = [method for method in settings.methods if site_of(method) == site]
            servers = {method: server_method(method, site) for method in of_site}
            for name in dict.fromkeys(servers.values()):
                with endpoint(host, name, [], **fields) as server:
                    run = SiteRun(settings, site, server, store, searched, fresh)
                    reports += run.reports([method for method in of_site if servers[method] == name])
    return {
        "schema": 1,
        "environment": environment(),
        "model": settings.host.model or "demo",
        "target_agreement": settings.target,
        "confidence": settings.confidence,
        "questions": {"search": len(searched), "certificate": len(fresh)},
        "methods": reports,
    }


@dataclass(frozen=True)
class SiteRun:
    """Calibration of the methods of one site, with the questions of the search and fresh ones."""

    settings: Settings
    site: Site
    endpoint: Endpoint
    store: Store
    searched: list[Item]
    fresh: list[Item]

    def reports(self, methods: Sequence[str]) -> list[dict[str, Any]]:
        """The part of the report on each method."""
        again = replace(full(self.site), label=f"{full(self.site).label} again")
        twice = self.fresh[:NUM_TWICE]
        self._ask([full(self.site), again], twice, f"{self.site}: all tokens, twice")
        with_itself = self._agreeing(again, twice) / len(twice)
        outcomes = {method: self._outcome(method) for method in methods}
        return [self._report(method, outcome, with_itself) for method, outcome in outcomes.items()]

    def _ask(self, variants: Sequence[Variant], items: Sequence[Item], label: str) -> None:
        """Have questions answered that have not been yet."""
        replay(self.endpoint, pairs(variants, items), self.store, self.settings.concurrency, label)

    def _replies(self, variant: Variant, item: Item) -> tuple[Reply, Reply]:
        """Answers of the full model and of a variant to a question."""
        return self.store[full(self.site).key, item.name], self.store[variant.key, item.name]

    def _agreeing(self, variant: Variant, items: Sequence[Item]) -> int:
        replies = (self._replies(variant, item) for item in items)
        return sum(before.text == after.text for before, after in replies)

    def _variant(self, method: str, keep: int) -> Variant:
        return Variant(method, self.site, method, keep)

    def _asker(self, method: str, items: Sequence[Item]) -> Ask:
        """The search's view of some questions."""

        def ask(budgets: Sequence[int], n: int) -> dict[int, int]:
            variants = {keep: self._variant(method, keep) for keep in budgets}
            label = f"{method} {','.join(map(str, budgets))}"
            self._ask([full(self.site), *variants.values()], items[:n], label)
            return {keep: self._agreeing(variant, items[:n]) for keep, variant in variants.items()}

        return ask

    def _outcome(self, method: str) -> Outcome:
        budgets, target = self.settings.budgets, self.settings.target
        candidate, seen = search(budgets, target, len(self.searched), self._asker(method, self.searched))
        if candidate is None:
            return Outcome(None, None, seen)
        fresh, confidence = self._asker(method, self.fresh), self.settings.confidence
        safe, tested = certify(budgets, candidate, target, len(self.fresh), fresh, confidence)
        return Outcome(safe, candidate, seen, tested)

    def _report(self, method: str, outcome: Outcome, with_itself: float) -> dict[str, Any]:
        return {
            "method": method,
            "site": self.site,
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
            "safe": self._safe(method, outcome),
            "warnings": self._warnings(method, outcome),
            **self._disagreements(method, outcome),
        }

    def _safe(self, method: str, outcome: Outcome) -> dict[str, Any] | None:
        """What the smallest safe budget keeps and saves."""
        if outcome.safe is None:
            return None
        safe, host = outcome.safe, self.settings.host
        variant, reference = self._variant(method, safe.keep), full(self.site)
        replies = [self._replies(variant, item) for item in self.fresh]
        moved = sorted(divergence(before.likely, after.likely) for before, after in replies)
        num_text_tokens = statistics.fmean(before.prompt_tokens for before, _ in replies) - host.num_tokens
        timed_items, variants = self.fresh[: NUM_TIMED + 1], [reference, variant]
        timed = first_token_ratio(self.endpoint, variants, timed_items, self.settings.seed)
        command = ["ficoco-vllm serve", host.model, f"--ficoco-method {method} --ficoco-keep {safe.keep}"]
        return {
            "keep": safe.keep,
            "agreement": round(safe.agreeing / safe.count, 4),
            "at_least": round(safe.bound, 4),
            "first_token_divergence": {
                "mean": round(statistics.fmean(moved), 5),
                "p95": round(moved[int(0.95 * (len(moved) - 1))], 5),
            },
            "kv_cache": kv_saving(self.settings.config, variant, host.num_tokens, num_text_tokens),
            "first_token": {key.split("/")[0]: value for key, value in timed.items()},
            "serve": " ".join(filter(None, command)),
        }

    def _warnings(self, method: str, outcome: Outcome) -> list[str]:
        """Signs that the server did not reduce in the search, in which case it would agree with itself."""
        lines = []
        for keep, (_, count) in sorted(outcome.searched.items()):
            variant = self._variant(method, keep)
            replies = [self._replies(variant, item) for item in self.searched[:count]]
            before, after = zip(*replies, strict=True)
            lines += check(variant, before, after, self.endpoint.num_tokens)
        return lines

    def _disagreements(self, method: str, outcome: Outcome) -> dict[str, Any]:
        """The worst disagreements at the safe budget, or where none is safe at the largest one that was tested.

        Returns:
            `worst_keep`, the budget; `worst_of`, whether its questions are those of the certificate or of the search;
            and `worst`, the questions that are answered otherwise than by the full model, the surest of its answers
            first.
        """
        if outcome.tested:
            keep, part, items = (outcome.safe or outcome.tested[0]).keep, "certificate", self.fresh
        else:
            keep, part = max(outcome.searched), "search"
            items = self.searched[: outcome.searched[keep][1]]
        variant = self._variant(method, keep)
        rows = []
        for item in items:
            before, after = self._replies(variant, item)
            if before.text != after.text:
                moved = round(divergence(before.likely, after.likely), 4)
                rows.append((moved, item, {"item": item.name, "full": before.text, "reduced": after.text}))
        rows.sort(key=lambda row: -row[0])
        worst = [
            {**texts, "divergence": moved, "patches": kept_patches(self.endpoint, variant, item)}
            for moved, item, texts in rows[:NUM_WORST]
        ]
        return {"worst_keep": keep, "worst_of": part, "worst": worst}
