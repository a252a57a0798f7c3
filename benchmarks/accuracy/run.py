"""One run: servers started or found, questions asked, figures written."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.client import Endpoint, Job, replay, served_model
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.suites import Row, rows, served_methods
from ficoco_vllm.benchmarks.accuracy.summary import summarise
from ficoco_vllm.benchmarks.accuracy.variant_package import write_package
from ficoco_vllm.benchmarks.accuracy.variants import HOST_METHOD, SITES, Site, Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.bars import environment
from ficoco_vllm.benchmarks.serving import serve


@dataclass(frozen=True)
class Options:
    """What a run asks, and where.

    Attributes:
        tables: among `suites.TABLES`.
        kinds: types of question.
        keeps: budgets of the method comparison.
        count: questions of each type.
        few_count: questions of each type in the ablations and sensitivity tables.
        answers: JSONL file; a run that was cut off goes on from it.
        methods: None means every one that the server's site can run.
        url: of a running server, or None: servers are started, one for each site.
        model: folder or name of the model to serve, or None: the demo model.
        api_key: of the server.
        num_tokens: visual tokens of an image without reduction.
        seed: of the questions.
        concurrency: questions under way at once.
        serve_arguments: more options for servers that are started.
    """

    tables: tuple[str, ...]
    kinds: tuple[str, ...]
    keeps: tuple[int, ...]
    count: int
    few_count: int
    answers: Path
    methods: tuple[str, ...] | None = None
    url: str | None = None
    model: str | None = None
    api_key: str = "none"
    num_tokens: int = 576
    seed: int = 0
    concurrency: int = 16
    serve_arguments: tuple[str, ...] = field(default=())

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for answers of two runs to be mixed."""
        return {
            "model": self.model or "demo",
            "seed": self.seed,
            "num_tokens": self.num_tokens,
            "workload": "embedded",
        }


def measure(options: Options) -> dict[str, Any]:
    """Ask everything and sum it up.

    Args:
        options: of the run.

    Returns:
        The result as it is written to JSON.

    Raises:
        ValueError: an option is wrong, or the answers are those of another run.
        RuntimeError: a server does not start.
        openai.APIError: a server refuses a question.
    """
    methods = options.methods or tuple(method for site in SITES for method in served_methods(site))
    wanted = rows(methods, options.keeps, options.tables, options.kinds)
    items = embedded(options.kinds, max(options.count, options.few_count), options.seed)
    with Store(options.answers, options.identity) as store:
        for site in SITES:
            jobs = [job for job in _jobs(wanted, items, options) if job[0].site == site]
            missing = [(variant, item) for variant, item in jobs if (variant.key, item.name) not in store]
            if not missing:
                continue
            with endpoint(options, site, [variant for variant, _ in missing]) as found:
                replay(found, jobs, store, options.concurrency, site)
        result = summarise(wanted, items, store, options.num_tokens, lambda row: _count(row, options))
    head = {"schema": 1, **options.identity, "environment": environment()}
    return {**head, "count": options.count, "few_count": options.few_count, **result}


@contextmanager
def endpoint(options: Options, site: Site, variants: Sequence[Variant], **changes: Any) -> Iterator[Endpoint]:
    """A server that can answer as some variants of one site.

    Args:
        options: of the run.
        site: where the variants reduce.
        variants: those with settings of their own are made known to a server that is started.
        **changes: fields of `Endpoint` other than its defaults.

    Raises:
        RuntimeError: the server does not start.
    """
    fields = {"num_tokens": options.num_tokens, "api_key": options.api_key, **changes}
    if options.url is not None:
        yield Endpoint(options.url, served_model(options.url, options.api_key), **fields)
        return
    with tempfile.TemporaryDirectory(prefix="ficoco-bench-") as name:
        folder = Path(name)
        variables = write_package(folder, variants)
        arguments = [*filter(None, [options.model]), "--ficoco-method", HOST_METHOD[site]]
        arguments += ["--trust-request-mm-kwargs", "--api-key", options.api_key, *options.serve_arguments]
        with serve(arguments, folder / "server.log", variables) as url:
            yield Endpoint(url, served_model(url, options.api_key), **fields)


def _count(row: Row, options: Options) -> int:
    return options.count if row.table == "methods" else options.few_count


def _jobs(wanted: Sequence[Row], items: Sequence[Item], options: Options) -> list[Job]:
    """Each variant with each of its questions, once, in an order that spreads the variants over the run."""
    asked: dict[tuple[str, str], Job] = {}
    for row in wanted:
        for item in questions_of(row, items, _count(row, options)):
            asked.setdefault((item.name, row.variant.key), (row.variant, item))
    return [asked[key] for key in sorted(asked, key=lambda key: (int(key[0].rsplit("-", 1)[1]), key))]


def questions_of(row: Row, items: Sequence[Item], count: int) -> list[Item]:
    """The first questions of each type that a row is asked."""
    found = []
    for kind in row.kinds:
        found += [item for item in items if item.kind == kind][:count]
    return found


def write(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, a line for each row of a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {key: value for key, value in result.items() if key != "rows"}
    lines = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
    path.write_text(json.dumps(head, indent=2)[:-2] + f',\n  "rows": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
