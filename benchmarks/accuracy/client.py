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

    def body(self, variant: Variant, item: Item) -> dict[str, Any]:
        """Arguments of `chat.completions.create` for one question."""
        with_image = variant.with_image and item.image is not None
        urls = [data_url(item.image or b"", item.media_type)] if with_image else []
        fields = {"max_tokens": self.max_tokens, "extra_body": variant.fields()}
        return chat(self.model, item.question, urls, **fields)


def replay(endpoint: Endpoint, jobs: Sequence[Job], store: Store, concurrency: int, label: str) -> None:
    """Ask what has not been answered yet; each answer is written as soon as it arrives.

    Args:
        endpoint: the server.
        jobs: variants with questions.
        store: of the answers; questions with an answer are skipped.
        concurrency: questions at the same time.
        label: of the progress bar.

    Raises:
        openai.APIError: the server refuses a question or does not answer.
    """
    try:
        asyncio.run(_replay(endpoint, jobs, store, concurrency, label))
    except ExceptionGroup as group:  # the error of the first worker ended the others
        raise group.exceptions[0] from group


async def _replay(
    endpoint: Endpoint, jobs: Sequence[Job], store: Store, concurrency: int, label: str
) -> None:
    from tqdm import tqdm

    missing = [(variant, item) for variant, item in jobs if (variant.key, item.name) not in store]
    waiting = iter(missing)
    client = AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key=endpoint.api_key, max_retries=3, timeout=600)
    async with client:
        with tqdm(total=len(jobs), initial=len(jobs) - len(missing), desc=label, mininterval=1.0) as bar:

            async def work() -> None:
                for variant, item in waiting:
                    store.add(variant.key, item.name, await _ask(client, endpoint, variant, item))
                    bar.update()

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
