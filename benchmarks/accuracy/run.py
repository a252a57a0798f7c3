"""One run of `bench accuracy`: servers, questions, figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import (
    CONCURRENCY,
    Host,
    Job,
    by_server,
    endpoint,
    replay,
    unanswered,
)
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.suites import Row, methods_of, rows
from ficoco_vllm.benchmarks.accuracy.summary import summarise
from ficoco_vllm.benchmarks.accuracy.variants import SITES
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.benchmarks.harness.terminal import Task


@dataclass(frozen=True)
class Options:
    """Questions of a run, and its server.

    Attributes:
        tables: among `suites.TABLES`.
        keeps: budgets of the method comparison.
        few_count: questions of each type in the ablations and sensitivity tables.
        answers: JSONL file; an interrupted run continues from it.
        methods: None means every one that the server's site can run.
    """

    tables: tuple[str, ...]
    kinds: tuple[str, ...]
    keeps: tuple[int, ...]
    count: int
    few_count: int
    answers: Path
    host: Host = field(default_factory=Host)
    methods: tuple[str, ...] | None = None
    seed: int = 0
    concurrency: int = CONCURRENCY

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for answers of two runs to be mixed."""
        return {**self.host.identity, "seed": self.seed, "workload": "embedded"}


def measure(options: Options) -> dict[str, Any]:
    """Ask all questions and summarise the answers.

    Returns:
        The result as it is written to JSON.

    Raises:
        ValueError: an option is wrong, or the answers are those of another run.
        RuntimeError: a server does not start, or nothing answers at the URL.
        openai.APIError: a server refuses a question.
    """
    methods = options.methods or methods_of(SITES)
    wanted = rows(methods, options.keeps, options.tables, options.kinds)
    items = embedded(options.kinds, max(options.count, options.few_count), options.seed)
    with Store(options.answers, options.identity) as store:
        jobs = _jobs(wanted, items, options)
        left = len(unanswered(jobs, store))
        with Task("questions", len(jobs), len(jobs) - left) as task:
            for method, missing in by_server(unanswered(jobs, store)).items():
                if options.host.url is None:
                    task.describe(f"questions, starting the server: {method}")
                with endpoint(options.host, method, [variant for variant, _ in missing]) as server:
                    task.describe(f"questions, {options.host.url or f'server of {method}'}")
                    replay(server, missing, store, options.concurrency, task)
        result = summarise(wanted, items, store, options.host.num_tokens, lambda row: _count(row, options))
    head = {"schema": 1, **options.identity, "dtype": options.host.dtype, "environment": environment()}
    return {**head, "count": options.count, "few_count": options.few_count, **result}


def _count(row: Row, options: Options) -> int:
    return options.count if row.table == "methods" else options.few_count


def _jobs(wanted: Sequence[Row], items: Sequence[Item], options: Options) -> list[Job]:
    """Each variant with each of its questions, once, in an order that spreads the variants over the run."""
    jobs: dict[tuple[str, str], Job] = {}
    for row in wanted:
        for item in questions_of(row, items, _count(row, options)):
            jobs.setdefault((item.name, row.variant.key), (row.variant, item))
    return [jobs[key] for key in sorted(jobs, key=lambda key: (int(key[0].rsplit("-", 1)[1]), key))]


def questions_of(row: Row, items: Sequence[Item], count: int) -> list[Item]:
    """The first questions of each type of a row."""
    return [item for kind in row.kinds for item in [one for one in items if one.kind == kind][:count]]
