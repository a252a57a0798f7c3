"""Traffic that turns: easy questions, hard ones, easy ones again, to a server that is to hold a target."""

import asyncio
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from openai import AsyncOpenAI

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.terminal import Task

# Colours and shapes, which few tokens tell, and numbers, which they do not.
EASY, HARD = ("colour", "shape", "yes_no_shapes"), ("number", "number_by_colour_2", "number_by_colour_3")
PHASES = (EASY, HARD, EASY)
# The default budget: nothing is named.
UNNAMED = Variant("unnamed", "tower")
# Few, so that a server on a CPU has room for second answers.
CONCURRENCY = 2


@dataclass
class Phase:
    """One kind of traffic.

    Attributes:
        agreeing: for each request in the order of the answers, whether it got the full model's.
        kept: visual tokens of its image.
    """

    agreeing: list[bool] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    tokens: int = 0

    @property
    def agreement(self) -> float:
        """Share of the answers that are those of the full model."""
        return sum(self.agreeing) / len(self.agreeing)

    def mean_kept(self, last: float = 1.0) -> float:
        """Mean number of visual tokens, in the last part of the phase."""
        kept = self.kept[-max(1, round(last * len(self.kept))) :]
        return sum(kept) / len(kept)


async def answers(server: Endpoint, items: Sequence[Item], variant: Variant) -> dict[str, str]:
    """The answers to some questions, by their names."""
    found: dict[str, str] = {}
    async with server.client(max_retries=1) as client:
        waiting = iter(items)

        async def work() -> None:
            for item in waiting:
                found[item.name] = (await _ask(client, server, item, variant))[0]

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return found


async def send(
    server: Endpoint, items: Sequence[Item], reference: Mapping[str, str], count: int, seed: int, task: Task
) -> Phase:
    """Send `count` questions that name no budget, drawn with replacement, and compare the answers.

    Args:
        server: to which they go.
        items: from which they are drawn.
        reference: the full model's answers.
        count: of requests.
        seed: of the draw.
        task: advances with each.
    """
    phase, draw = Phase(), random.Random(seed)
    waiting = iter([draw.choice(items) for _ in range(count)])
    async with server.client(max_retries=1) as client:

        async def work() -> None:
            for item in waiting:
                text, kept, num_tokens = await _ask(client, server, item, UNNAMED)
                phase.agreeing.append(text == reference[item.name])
                phase.kept.append(kept)
                phase.tokens += num_tokens
                task.advance()

        await asyncio.gather(*(work() for _ in range(CONCURRENCY)))
    return phase


async def _ask(client: AsyncOpenAI, server: Endpoint, item: Item, variant: Variant) -> tuple[str, int, int]:
    body = server.body(variant, item)
    if variant is UNNAMED:
        body.pop("extra_body")
    answer = await client.chat.completions.create(**body)
    assert answer.usage is not None
    kept = int((answer.usage.model_extra or {})["ficoco"]["visual_tokens_kept"])
    return answer.choices[0].message.content or "", kept, answer.usage.total_tokens


FULL = full("tower")
