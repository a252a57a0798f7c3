"""A server of the accuracy benchmarks, running or started for them, and the client that asks it many questions."""

import asyncio
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import AsyncOpenAI

from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.variant_package import write_package
from ficoco_vllm.benchmarks.accuracy.variants import SITES, Variant, server_method
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import chat, data_url, served_model
from ficoco_vllm.benchmarks.harness.serving import serving
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.compat import is_cpu_build

CONCURRENCY = 16
Job = tuple[Variant, Item]


@dataclass(frozen=True)
class Endpoint:
    """A running server.

    Attributes:
        num_tokens: visual tokens of an image without reduction.
        num_logprobs: how many of the most likely first tokens are kept with an answer, at most 20.
    """

    url: str
    model: str
    num_tokens: int
    api_key: str = "none"
    max_tokens: int = 16
    num_logprobs: int = 1

    def client(self, max_retries: int) -> AsyncOpenAI:
        """A client of the server, to be closed after use."""
        return AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=max_retries, timeout=600
        )

    def body(self, variant: Variant, item: Item) -> dict[str, Any]:
        """Arguments of `chat.completions.create` for one question."""
        with_image = variant.with_image and item.image is not None
        urls = [data_url(item.image or b"", item.media_type)] if with_image else []
        return chat(self.model, item.question, urls, max_tokens=self.max_tokens, extra_body=variant.fields())


@dataclass(frozen=True)
class Host:
    """A server.

    Attributes:
        url: address of a running server without a path, or None: servers are started, one for each site
            and for each method that reduces twice.
        model: folder or name of the model to serve, or None: the demo model.
        num_tokens: visual tokens of an image without reduction.
        arguments: more options for servers that are started.
    """

    url: str | None = None
    model: str | None = None
    api_key: str = "none"
    num_tokens: int = 576
    arguments: tuple[str, ...] = ()

    @property
    def identity(self) -> dict[str, Any]:
        """What must be equal for answers of two runs to be mixed."""
        return {"model": self.model or "demo", "num_tokens": self.num_tokens}

    @property
    def dtype(self) -> str | None:
        """Type in which the servers compute; None where that is known to them alone."""
        started = self.url is None and self.model is None and "--dtype" not in self.arguments
        return "float32" if started and is_cpu_build() else None  # as `ficoco-vllm serve` without a model


@contextmanager
def endpoint(host: Host, method: str, variants: Sequence[Variant], **changes: Any) -> Iterator[Endpoint]:
    """A server that can answer as some variants.

    Args:
        host: which server.
        method: method of a server that is started, see `server_method`.
        variants: a server that is started offers those with settings of their own as methods.
        **changes: fields of `Endpoint` other than its defaults.

    Raises:
        RuntimeError: the server does not start, or nothing answers at its URL.
    """
    fields = {"num_tokens": host.num_tokens, "api_key": host.api_key, **changes}
    if host.url is not None:
        yield Endpoint(host.url, served_model(host.url, host.api_key), **fields)
        return
    with tempfile.TemporaryDirectory(prefix="ficoco-bench-") as name:
        folder = Path(name)
        variables = write_package(folder, variants)
        arguments = [*filter(None, [host.model]), "--ficoco-method", method]
        arguments += ["--api-key", host.api_key, *host.arguments]
        with serving(arguments, folder / "server.log", variables) as server:
            yield Endpoint(server.url, served_model(server.url, host.api_key), **fields)


def by_server(jobs: Iterable[Job]) -> dict[str, list[Job]]:
    """Variants with questions, by the method of the server that answers them."""
    groups: dict[str, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: SITES.index(job[0].site)):
        groups.setdefault(server_method(job[0].method, job[0].site), []).append(job)
    return groups


def unanswered(jobs: Iterable[Job], store: Store) -> list[Job]:
    """Variants with questions that they have not answered yet."""
    return [(variant, item) for variant, item in jobs if (variant.key, item.name) not in store]


def replay(
    endpoint: Endpoint, jobs: Sequence[Job], store: Store, concurrency: int, progress: str | Task
) -> None:
    """Ask what has not been answered yet; each answer is stored as soon as it arrives.

    Args:
        endpoint: the server.
        jobs: variants with questions.
        store: store of the answers; questions with an answer are skipped.
        concurrency: concurrent questions.
        progress: advances with each answer; a text is the label of one for these questions alone.

    Raises:
        openai.APIError: the server refuses a question or does not answer.
    """
    missing = unanswered(jobs, store)
    if isinstance(progress, str):
        with Task(progress, len(jobs), len(jobs) - len(missing)) as task:
            return replay(endpoint, missing, store, concurrency, task)
    waiting = iter(missing)

    async def work(client: AsyncOpenAI) -> None:
        for variant, item in waiting:
            store.add(variant.key, item.name, await _ask(client, endpoint, variant, item))
            progress.advance()

    async def work_together() -> None:
        async with endpoint.client(max_retries=3) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(client))

    try:
        asyncio.run(work_together())
    except ExceptionGroup as group:  # the error of the first worker ended the others
        raise group.exceptions[0] from group
    return None


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, variant: Variant, item: Item) -> Reply:
    body = endpoint.body(variant, item)
    answer = await client.chat.completions.create(**body, logprobs=True, top_logprobs=endpoint.num_logprobs)
    choice = answer.choices[0]
    first = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
    likely = {entry.token: entry.logprob for entry in first}
    prompt_tokens = answer.usage.prompt_tokens if answer.usage else 0
    return Reply((choice.message.content or "").strip(), prompt_tokens, likely)


def pairs(variants: Iterable[Variant], items: Sequence[Item]) -> list[Job]:
    """Every variant with every question."""
    return [(variant, item) for variant in variants for item in items]
