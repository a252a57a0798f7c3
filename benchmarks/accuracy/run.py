"""One run of `bench accuracy`: servers, questions, figures."""

from collections.abc import Iterable, Sequence
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
from ficoco_vllm.benchmarks.accuracy.suites import Row, rows
from ficoco_vllm.benchmarks.accuracy.summary import summarise
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.harness.results import environment
from ficoco_vllm.benchmarks.harness.terminal import Task


def measure(
    *,
    methods: Sequence[str],
    keeps: Sequence[int],
    tables: Sequence[str],
    kinds: Sequence[str],
    count: int,
    answers: Path,
    host: Host,
    seed: int = 0,
    concurrency: int = CONCURRENCY,
) -> dict[str, Any]:
    """The result of a run as it is written to JSON, after all questions are asked.

    Args:
        methods: methods of the rows, see `suites.rows`.
        keeps: budgets of the method comparison.
        tables: among `suites.TABLES`.
        kinds: types of question.
        count: questions of each type.
        answers: JSONL file; an interrupted run continues from it.
        host: the server.
        seed: seed of the questions.
        concurrency: concurrent questions.

    Raises:
        ValueError: an option is wrong, or the answers are those of another run.
        RuntimeError: a server does not start, or nothing answers at the URL.
        openai.APIError: a server refuses a question.
    """
    wanted = rows(methods, keeps, tables, kinds)
    items = embedded(kinds, count, seed)
    run = {**host.identity, "seed": seed, "workload": "embedded"}
    with Store(answers, run) as store:
        jobs = _jobs(wanted, items)
        missing = unanswered(jobs, store)
        with Task("questions", len(jobs), len(jobs) - len(missing)) as task:
            for method, asked in by_server(missing).items():
                if host.url is None:
                    task.describe(f"questions, starting the server: {method}")
                with endpoint(host, method, [variant for variant, _ in asked]) as server:
                    task.describe(f"questions, {host.url or f'server of {method}'}")
                    replay(server, asked, store, concurrency, task)
        result = summarise(wanted, items, store, host.num_tokens)
    head = {"schema": 1, **run, "dtype": host.dtype, "environment": environment(), "count": count}
    return {**head, **result}


def _jobs(wanted: Iterable[Row], items: Sequence[Item]) -> list[Job]:
    """Each variant with each of its questions, once, in an order that spreads the variants over the run."""
    jobs = {
        (int(item.name.rsplit("-", 1)[1]), item.name, row.variant.key): (row.variant, item)
        for row in wanted
        for item in items
        if item.kind in row.kinds
    }
    return [jobs[place] for place in sorted(jobs)]
