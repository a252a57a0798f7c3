"""Traffic that turns: easy questions, hard ones, easy ones again, to a server that is to hold a target."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import full
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.terminal import Task

# Colours and shapes, which few tokens tell, and numbers, which they do not.
EASY, HARD = ("colour", "shape", "yes_no_shapes"), ("number", "number_by_colour_2", "number_by_colour_3")
PHASES = (EASY, HARD, EASY)
# Few, so that a server on a CPU has room for second answers.
CONCURRENCY = 2


class Answer(NamedTuple):
    """An answer, the visual tokens kept of its image, and the tokens of prompt and answer."""

    text: str
    kept: int
    num_tokens: int


class Phase(NamedTuple):
    """Answers in the order sent: whether each is the full model's, its visual tokens kept, and the tokens of all."""

    agreeing: list[bool]
    kept: list[int]
    num_tokens: int


async def answers(
    server: Endpoint, items: Sequence[Item], *, all_tokens: bool = False, task: Task | None = None
) -> list[Answer]:
    """The answers to some questions that name no budget, or ask for all visual tokens; `task` advances with each."""
    free = asyncio.Semaphore(CONCURRENCY)

    async def ask(item: Item) -> Answer:
        async with free:
            body = server.body(full("tower"), item)
            if not all_tokens:
                del body["extra_body"]
            answer = await client.chat.completions.create(**body)
        if task is not None:
            task.advance()
        assert answer.usage is not None
        kept = int((answer.usage.model_extra or {})["ficoco"]["visual_tokens_kept"])
        return Answer(answer.choices[0].message.content or "", kept, answer.usage.total_tokens)

    async with server.client(max_retries=1) as client:
        return await asyncio.gather(*map(ask, items))


def reference(server: Endpoint, items: Sequence[Item]) -> dict[str, str]:
    """The full model's answers, by the names of the questions."""
    replies = asyncio.run(answers(server, items, all_tokens=True))
    return {item.name: answer.text for item, answer in zip(items, replies, strict=True)}


def send(
    server: Endpoint, items: Sequence[Item], expected: Mapping[str, str], count: int, seed: int, task: Task
) -> Phase:
    """Send `count` questions without a budget, sampled with replacement, and compare the answers with `expected`."""
    draw = random.Random(seed)
    chosen = [draw.choice(items) for _ in range(count)]
    replies = asyncio.run(answers(server, chosen, task=task))
    agreeing = [answer.text == expected[item.name] for item, answer in zip(chosen, replies, strict=True)]
    return Phase(agreeing, [answer.kept for answer in replies], sum(answer.num_tokens for answer in replies))
