"""Client that asks a server many questions at a time and stores each answer as it arrives."""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from openai import AsyncOpenAI

from ficoco_vllm.benchmarks.accuracy.store import Reply, Store
from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import chat, data_url
from ficoco_vllm.benchmarks.harness.terminal import Task

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
        fields = {"max_tokens": self.max_tokens, "extra_body": variant.fields()}
        return chat(self.model, item.question, urls, **fields)


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
        store: of the answers; questions with an answer are skipped.
        concurrency: concurrent questions.
        progress: advances with each answer; a text is the label of one for these questions alone.

    Raises:
        openai.APIError: the server refuses a question or does not answer.
    """
    missing = unanswered(jobs, store)
    if isinstance(progress, str):
        with Task(progress, len(jobs), len(jobs) - len(missing)) as task:
            return replay(endpoint, missing, store, concurrency, task)
    try:
        asyncio.run(_replay(endpoint, missing, store, concurrency, progress))
    except ExceptionGroup as group:  # the error of the first worker ended the others
        raise group.exceptions[0] from group
    return None


async def _replay(
    endpoint: Endpoint, missing: Sequence[Job], store: Store, concurrency: int, task: Task
) -> None:
    waiting = iter(missing)
    async with endpoint.client(max_retries=3) as client:

        async def work() -> None:
            for variant, item in waiting:
                store.add(variant.key, item.name, await _ask(client, endpoint, variant, item))
                task.advance()

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())


async def _ask(client: AsyncOpenAI, endpoint: Endpoint, variant: Variant, item: Item) -> Reply:
    body = endpoint.body(variant, item)
    answer = await client.chat.completions.create(**body, logprobs=True, top_logprobs=endpoint.num_logprobs)
    choice = answer.choices[0]
    first = choice.logprobs.content[0] if choice.logprobs and choice.logprobs.content else None
    likely = {} if first is None else {entry.token: entry.logprob for entry in first.top_logprobs}
    prompt_tokens = answer.usage.prompt_tokens if answer.usage else 0
    return Reply((choice.message.content or "").strip(), prompt_tokens, likely)


def pairs(variants: Iterable[Variant], items: Sequence[Item]) -> list[Job]:
    """Every variant with every question."""
    return [(variant, item) for variant in variants for item in items]
