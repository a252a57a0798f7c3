"""Requests at a fixed rate, independent of the server, each with its time to first token."""

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import chat, data_url, first_token

QUESTION = "what number is on the sign?"


@dataclass(frozen=True)
class Answer:
    """One request.

    Attributes:
        ttft_seconds: from sending it to its first token.
        num_prompt_tokens: placeholders of the image and text.
    """

    arrival_seconds: float
    ttft_seconds: float
    num_prompt_tokens: int


class Driver:
    """Client whose chats have one new image each."""

    def __init__(self, client: AsyncOpenAI, model: str, num_output: int, seed: int = 0) -> None:
        """Client of one server."""
        self._client = client
        self._model = model
        self._num_output = num_output
        self._random = random.Random(seed)

    async def ask(self, arrival_seconds: float = 0.0, **extra: Any) -> Answer:
        """Send one chat.

        Args:
            arrival_seconds: for the answer.
            **extra: fields of the body beyond OpenAI's, such as a budget of its own.
        """
        fields = {"ignore_eos": True, **extra}
        body = chat(self._model, QUESTION, [data_url(self._image())], max_tokens=self._num_output)
        seconds, num_prompt_tokens = await first_token(self._client, {**body, "extra_body": fields})
        return Answer(arrival_seconds, seconds, num_prompt_tokens)

    async def capacity(self, seconds: float, num_clients: int, **extra: Any) -> float:
        """Requests a second that the server answers when enough of them wait.

        Args:
            seconds: how long at least; each client is answered twice on average.
            num_clients: requests at the same time.
            **extra: as for `ask`.
        """
        begin, ends = time.monotonic(), list[float]()
        enough: list[float] = []

        async def client() -> None:
            while not enough:
                await self.ask(**extra)
                ends.append(time.monotonic())
                if not enough and ends[-1] - begin >= seconds and len(ends) >= 2 * num_clients:
                    enough.extend(ends)

        await asyncio.gather(*(client() for _ in range(num_clients)))
        # From the first answer on; answers after the last request was sent do not count.
        return (len(enough) - 1) / (enough[-1] - enough[0])

    async def arrive(self, rate: float, seconds: float, **extra: Any) -> list[Answer]:
        """Send requests at Poisson arrivals and wait for all answers.

        Returns:
            The answers in order of arrival.
        """
        begin, tasks, due = time.monotonic(), list[asyncio.Task[Answer]](), self._random.expovariate(rate)
        while due < seconds:
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            tasks.append(asyncio.create_task(self.ask(due, **extra)))
            due += self._random.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    def _image(self) -> Image.Image:
        pixels = np.frombuffer(self._random.randbytes(32 * 32 * 3), dtype=np.uint8).reshape(32, 32, 3)
        return Image.fromarray(pixels)


def ttft(answers: Sequence[Answer], begin: float, end: float) -> float:
    """Median time to first token of the requests that arrived within a share of the phase."""
    count = len(answers)
    return median(answer.ttft_seconds for answer in answers[int(begin * count) : max(1, int(end * count))])
