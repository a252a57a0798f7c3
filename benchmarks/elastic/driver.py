"""Requests at a rate of their own, whatever the server does, and what each of them saw."""

import asyncio
import base64
import io
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from openai import AsyncOpenAI
from PIL import Image

QUESTION = "what number is on the sign?"


@dataclass(frozen=True)
class Answer:
    """One request.

    Attributes:
        arrival_seconds: since the phase began.
        ttft_seconds: from sending it to its first token.
        num_prompt_tokens: placeholders of the image and text.
    """

    arrival_seconds: float
    ttft_seconds: float
    num_prompt_tokens: int


class Driver:
    """Chats with an image each, none of which the server has seen before."""

    def __init__(self, client: AsyncOpenAI, model: str, num_output: int, seed: int = 0) -> None:
        """Send to one server.

        Args:
            client: of the server, without retries.
            model: as served.
            num_output: tokens of every answer.
            seed: of images and arrivals.
        """
        self._client = client
        self._model = model
        self._num_output = num_output
        self._random = random.Random(seed)

    async def ask(self, arrival_seconds: float = 0.0, **extra: Any) -> Answer:
        """One streamed chat.

        Args:
            arrival_seconds: to be noted.
            **extra: fields of the body beyond OpenAI's, such as a budget of its own.
        """
        content = [
            {"type": "image_url", "image_url": {"url": self._image()}},
            {"type": "text", "text": QUESTION},
        ]
        messages: Any = [{"role": "user", "content": content}]
        begin = time.monotonic()
        stream = await self._client.chat.completions.create(
            model=self._model,
            messages=messages,
            max_tokens=self._num_output,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True, **extra},
        )
        first, num_prompt_tokens = None, 0
        async for chunk in stream:
            if first is None and chunk.choices and chunk.choices[0].delta.content is not None:
                # The first chunk names the role; it comes with the first token, and so is empty.
                first = time.monotonic()
            if chunk.usage is not None:
                num_prompt_tokens = chunk.usage.prompt_tokens
        assert first is not None
        return Answer(arrival_seconds, first - begin, num_prompt_tokens)

    async def capacity(self, seconds: float, num_clients: int, **extra: Any) -> float:
        """Requests a second that the server manages when there are always enough of them.

        Args:
            seconds: how long at least; each client is answered twice on average.
            num_clients: requests at once.
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
        # From the first answer on, and without those that were answered while no more came.
        return (len(enough) - 1) / (enough[-1] - enough[0])

    async def arrive(self, rate: float, seconds: float, **extra: Any) -> list[Answer]:
        """Poisson arrivals; returns when all have been answered.

        Args:
            rate: requests a second.
            seconds: how long requests arrive.
            **extra: as for `ask`.

        Returns:
            In order of arrival.
        """
        begin, tasks, due = time.monotonic(), [], self._random.expovariate(rate)
        while due < seconds:
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            tasks.append(asyncio.create_task(self.ask(due, **extra)))
            due += self._random.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    def _image(self) -> str:
        pixels = np.frombuffer(self._random.randbytes(32 * 32 * 3), dtype=np.uint8).reshape(32, 32, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def ttft(answers: Sequence[Answer], begin: float, end: float) -> float:
    """Median time to first token of the requests that arrived within a share of the phase.

    Args:
        answers: in order of arrival.
        begin: share of the requests before it, 0 to 1.
        end: share of the requests up to its end.
    """
    count = len(answers)
    return median(answer.ttft_seconds for answer in answers[int(begin * count) : max(1, int(end * count))])
