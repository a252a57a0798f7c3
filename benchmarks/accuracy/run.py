"""One run of `bench accuracy`: servers, questions, figures."""

from collections.abc import Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import CONCURRENCY, Host, by_server, endpoint, replay, unanswered
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.suites import rows
from ficoco_vllm.benchmarks.accuracy.summary import summarise
from ficoco_vllm.benchmarks.accuracy.workload import embedded
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

    The rows are those of `suites.rows`, with `count` questions of each type; an interrupted run continues from the
    JSONL file `answers`.

    Raises:
        ValueError: an option is wrong, or the answers are those of another run.
        RuntimeError: a server does not start, or nothing answers at the URL.
        openai.APIError: a server refuses a question.
    """
    wanted = rows(methods, keeps, tables, kinds)
    items = embedded(kinds, count, seed)
    run = {**host.identity, "seed": seed, "workload": "embedded"}
    with Store(answers, run) as store:
        # Each variant with each of its questions, once, in an order that spreads the variants over the run.
        asked_of = {
            (int(item.name.rsplit("-", 1)[1]), item.name, row.variant.key): (row.variant, item)
            for row, item in product(wanted, items)
            if item.kind in row.kinds
        }
        jobs = [job for _, job in sorted(asked_of.items(), key=itemgetter(0))]
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
