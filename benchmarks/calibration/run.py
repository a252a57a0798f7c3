"""Replay a user's questions against the full model and reduced ones; find the smallest budget that still agrees."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import CONCURRENCY, Endpoint, Host, endpoint, pairs, replay
from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.summary import check
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full, server_method, site_of
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.calibration.effects import (
    EXPLAINS,
    divergence,
    first_token_speedup,
    kept_patches,
    kv_saving,
)
from ficoco_vllm.benchmarks.calibration.search import FIRST, Seen, Tested, certify, needed, search
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
    """The report as it is written to JSON, after the smallest safe budget of each method is found.

    Raises:
        ValueError: too few questions, or the answers on disk are those of another run.
        RuntimeError: a server does not start.
        openai.APIError: a server refuses a question.
    """
    searched, fresh = split(items, settings.target, settings.confidence)
    workload = {"workload": [item.name for item in items], "tokens": settings.max_tokens}
    host = replace(settings.host, arguments=(*settings.host.arguments, *EXPLAINS))
    fields = {"max_tokens": settings.max_tokens, "num_logprobs": NUM_LOGPROBS}
    servers = {method: server_method(method, site_of(method)) for method in settings.methods}
    reports = []
    with Store(settings.answers, {**settings.host.identity, **workload}) as store:
        for name in dict.fromkeys(servers.values()):
            with endpoint(host, name, [], **fields) as server:
                methods = [method for method in settings.methods if servers[method] == name]
                runs = (MethodRun(settings, method, server, store, searched, fresh) for method in methods)
                reports += [run.report() for run in runs]
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
class MethodRun:
    """Calibration of one method on its server, with the questions of the search and fresh ones."""

    settings: Settings
    method: str
    endpoint: Endpoint
    store: Store
    searched: list[Item]
    fresh: list[Item]

    def report(self) -> dict[str, Any]:
        """The part of the report on the method."""
        budgets, target = self.settings.budgets, self.settings.target
        again, twice = replace(self._full, label=f"{self._full.label} again"), self.fresh[:NUM_TWICE]
        (same,) = self._agreeing([again], twice, "all tokens, twice")
        candidate, seen = search(budgets, target, len(self.searched), partial(self._ask, self.searched))
        fresh = (len(self.fresh), partial(self._ask, self.fresh))
        safe, tested = certify(budgets, candidate, target, *fresh, self.settings.confidence)
        return {
            "method": self.method,
            "full_agrees_with_itself": round(same / len(twice), 4),
            "searched": [_figures(keep, agreeing, n) for keep, (agreeing, n) in sorted(seen.items())],
            "tested": [_tested(test) | {"safe": test.bound >= target} for test in tested],
            "safe": None if safe is None else _tested(safe) | self._effects(safe.keep),
            "warnings": self._warnings(seen),
            **self._disagreements(seen, safe or next(iter(tested), None)),
        }

    @property
    def _full(self) -> Variant:
        return full(site_of(self.method))

    def _variant(self, keep: int) -> Variant:
        return Variant(self.method, site_of(self.method), self.method, keep)

    def _replies(self, variant: Variant, items: Sequence[Item]) -> list[tuple[Reply, Reply]]:
        """Answers of the full model and of a variant to each question."""
        return [(self.store[self._full.key, item.name], self.store[variant.key, item.name]) for item in items]

    def _agreeing(self, variants: Sequence[Variant], items: Sequence[Item], label: str) -> list[int]:
        """Number of each variant's answers that equal the full model's; missing answers are requested first."""
        jobs = pairs([self._full, *variants], items)
        replay(self.endpoint, jobs, self.store, self.settings.concurrency, f"{self.method}: {label}")
        replies = (self._replies(variant, items) for variant in variants)
        return [sum(before.text == after.text for before, after in both) for both in replies]

    def _ask(self, items: Sequence[Item], budgets: Sequence[int], n: int) -> dict[int, int]:
        """The search's view of some questions; see `Ask`."""
        variants, label = [self._variant(keep) for keep in budgets], f"{','.join(map(str, budgets))} tokens"
        return dict(zip(budgets, self._agreeing(variants, items[:n], label), strict=True))

    def _effects(self, keep: int) -> dict[str, Any]:
        """Effects of a budget on answers, KV cache and time to first token, and the command that serves it."""
        variant, host, seed = self._variant(keep), self.settings.host, self.settings.seed
        replies, timed = self._replies(variant, self.fresh), self.fresh[: NUM_TIMED + 1]
        moved = statistics.fmean(divergence(before.likely, after.likely) for before, after in replies)
        num_text_tokens = statistics.fmean(before.prompt_tokens for before, _ in replies) - host.num_tokens
        command = ["ficoco-vllm serve", host.model, f"--ficoco-method {self.method} --ficoco-keep {keep}"]
        return {
            "first_token_divergence": round(moved, 5),
            "kv_cache": kv_saving(self.settings.config, variant, host.num_tokens, num_text_tokens),
            "first_token": first_token_speedup(self.endpoint, self._full, variant, timed, seed),
            "serve": " ".join(filter(None, command)),
        }

    def _warnings(self, seen: Seen) -> list[str]:
        """Signs that the server did not reduce in the search, in which case it would agree with itself."""
        lines = []
        for keep, (_, count) in sorted(seen.items()):
            variant = self._variant(keep)
            before, after = zip(*self._replies(variant, self.searched[:count]), strict=True)
            lines += check(variant, before, after, self.endpoint.num_tokens)
        return lines

    def _disagreements(self, seen: Seen, test: Tested | None) -> dict[str, Any]:
        """The worst disagreements in a test, or without one at the largest budget of the search.

        `worst_keep` is the budget, `worst_of` the part whose questions they are, and `worst` those that are answered
        otherwise than by the full model, the surest of its answers first.
        """
        keep, part, items = max(seen), "search", self.searched[: seen[max(seen)][1]]
        if test is not None:
            keep, part, items = test.keep, "certificate", self.fresh
        variant = self._variant(keep)
        changed = [
            (divergence(before.likely, after.likely), item, {"full": before.text, "reduced": after.text})
            for item, (before, after) in zip(items, self._replies(variant, items), strict=True)
            if before.text != after.text
        ]
        changed.sort(key=lambda row: -row[0])
        worst = [
            {"item": item.name, **texts, "divergence": round(moved, 4)}
            | {"patches": kept_patches(self.endpoint, variant, item)}
            for moved, item, texts in changed[:NUM_WORST]
        ]
        return {"worst_keep": keep, "worst_of": part, "worst": worst}


def _figures(keep: int, agreeing: int, count: int) -> dict[str, Any]:
    return {"keep": keep, "agreeing": agreeing, "count": count, "agreement": round(agreeing / count, 4)}


def _tested(test: Tested) -> dict[str, Any]:
    return _figures(test.keep, test.agreeing, test.count) | {"at_least": round(test.bound, 4)}
