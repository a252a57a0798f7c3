"""A server of the accuracy benchmarks, running or started for them, and the client that asks it many questions."""

import asyncio
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import product
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
    """A running server, whose images have `num_tokens` visual tokens without reduction.

    With an answer, `num_logprobs` of the most likely first tokens are kept, at most 20.
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
    """A running server, by its URL without a path, or without a URL the settings of servers to start.

    Attributes:
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
def endpoint(
    host: Host, method: str | None, variants: Sequence[Variant], **changes: Any
) -> Iterator[Endpoint]:
    """A server that can answer as some variants; if it is started, it runs `method` and offers theirs.

    `changes` are fields of `Endpoint`. See `server_method` for the method.

    Raises:
        RuntimeError: the server does not start, or nothing answers at its URL.
    """
    with ExitStack() as stack:
        url = host.url
        if url is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ficoco-bench-")))
            arguments = [*filter(None, [host.model]), "--api-key", host.api_key, *host.arguments]
            arguments += [] if method is None else ["--ficoco-method", method]
            started = serving(arguments, folder / "server.log", write_package(folder, variants))
            url = stack.enter_context(started).url
        yield Endpoint(url, served_model(url, host.api_key), host.num_tokens, host.api_key, **changes)


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

    `progress` advances with each answer; a text is the label of one for these questions alone.

    Raises:
        openai.APIError: the server refuses a question or does not answer.
    """
    missing = unanswered(jobs, store)
    waiting = iter(missing)

    async def work(client: AsyncOpenAI) -> None:
        for variant, item in waiting:
            store.add(variant.key, item.name, await _ask(client, endpoint, variant, item))
            task.advance()

    async def work_together() -> None:
        async with endpoint.client(max_retries=3) as client:
            await asyncio.gather(*(work(client) for _ in range(concurrency)))

    done = len(jobs) - len(missing)
    own = Task(progress, len(jobs), done) if isinstance(progress, str) else nullcontext(progress)
    with own as task:
        asyncio.run(work_together())


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, variant: Variant, item: Item) -> Reply:
    body = endpoint.body(variant, item)
    answer = await client.chat.completions.create(**body, logprobs=True, top_logprobs=endpoint.num_logprobs)
    choice = answer.choices[0]
    first = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
    prompt_tokens = answer.usage.prompt_tokens if answer.usage else 0
    text = (choice.message.content or "").strip()
    return Reply(text, prompt_tokens, {entry.token: entry.logprob for entry in first})


def pairs(variants: Iterable[Variant], items: Sequence[Item]) -> list[Job]:
    """Every variant with every question."""
    return list(product(variants, items))
