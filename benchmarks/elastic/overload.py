"""The same rate of arrivals with the ceiling as a fixed budget, and with a budget that follows the load."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any

from openai import AsyncOpenAI
from PIL import Image

from ficoco_vllm.benchmarks.harness.http import chat, data_url, first_token, metric

FLOOR, CEILING = 64, 576
# Tokens of an answer. With it, prompts of 576 visual tokens take 22 blocks of 32, those of 64 take 6: two against seven
# concurrent requests in 44 blocks, since vLLM keeps one for itself.
NUM_OUTPUT = 96
_FEWEST_ARRIVALS = 24
Fields = dict[str, Any]


@dataclass(frozen=True)
class Length:
    """Lengths of the phases, arrivals over the throughput of the fixed ceiling, and the controller's times."""

    capacity_seconds: float
    overload_seconds: float
    overload: float
    attack_seconds: float
    release_seconds: float
    max_release_seconds: float


# In the short form the machine may get faster between the measurement of its capacity and the phases: with 2.4 the
# ceiling is overloaded all the same, and the floor, which serves 3.5 times as many at once, is not.
SHORT = Length(8, 16, 2.4, 0.3, 2, 8)
LONG = Length(20, 60, 1.6, 1, 5, 60)


def arguments(length: Length, num_servers: int) -> list[str]:
    """Options of a server whose KV cache is the bottleneck."""
    elastic = {
        "floor": FLOOR,
        "ceiling": CEILING,
        "levels": 3,
        "attack_seconds": length.attack_seconds,
        "release_seconds": length.release_seconds,
        "max_release_seconds": length.max_release_seconds,
    }
    return [
        *("--ficoco-method", "ficoco-v", "--ficoco-elastic", json.dumps(elastic)),
        *("--trust-request-mm-kwargs", "--no-enable-prefix-caching", "--max-model-len", "1024"),
        *("--block-size", "32", "--num-gpu-blocks-override", "45", "--api-server-count", str(num_servers)),
    ]


async def run(url: str, seed: int, length: Length, api_key: str = "none") -> dict[str, Any]:
    """Run both phases on one server, which was started with `arguments`.

    Returns:
        `capacity`, requests per second that the fixed ceiling serves; `rate` of the arrivals in both phases; `fixed`,
        the phase in which every request names the ceiling; `elastic`, the one in which none names a budget;
        `return_seconds` from its end until the default was the ceiling again, with light traffic. Of a phase:
        `num_requests`; `early_ttft_seconds` and `late_ttft_seconds`, medians of its first and last quarter;
        `longest_queue` and `lowest_default`, sampled; `budgets` that requests had, ascending.

    Raises:
        TimeoutError: the default does not return to the ceiling.
    """
    # One retry: the server may close an idle connection at the moment in which it is used again.
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=api_key, max_retries=1, timeout=300) as client:
        return await Overload(client, url, length, random.Random(seed)).run()


@dataclass(frozen=True)
class Overload:
    """One run of the experiment; its chats have one new image each."""

    client: AsyncOpenAI
    url: str
    length: Length
    random: random.Random

    async def run(self) -> dict[str, Any]:
        """Measure the capacity, then both phases."""
        explicit: Fields = {"mm_processor_kwargs": {"ficoco_keep": CEILING}}
        num_text = (await self._ask(explicit))[1] - CEILING
        capacity = await self._capacity(6, explicit)
        result: dict[str, Any] = {"capacity": capacity, "rate": self.length.overload * capacity}
        for name, fields in (("fixed", explicit), ("elastic", {})):
            await self._calm()
            result[name] = await self._phase(result["rate"], num_text, fields)
        begin = time.monotonic()
        await self._calm()
        return {**result, "return_seconds": time.monotonic() - begin}

    async def _ask(self, fields: Fields) -> tuple[float, int]:
        """Send one chat; see `first_token` for the result."""
        image = Image.frombytes("RGB", (32, 32), self.random.randbytes(32 * 32 * 3))
        body = chat("ficoco-demo", "what number is on the sign?", [data_url(image)], max_tokens=NUM_OUTPUT)
        return await first_token(self.client, {**body, "extra_body": {"ignore_eos": True, **fields}})

    async def _capacity(self, num_clients: int, fields: Fields) -> float:
        """Requests per second that the server answers when enough of them wait."""
        begin, ends = time.monotonic(), list[float]()

        async def client() -> None:
            while len(ends) < 2 * num_clients or ends[-1] - begin < self.length.capacity_seconds:
                await self._ask(fields)
                ends.append(time.monotonic())

        await asyncio.gather(*(client() for _ in range(num_clients)))
        # From the first answer on. Once there are enough, every other client waits for one more, which does not count.
        del ends[1 - num_clients :]
        return (len(ends) - 1) / (ends[-1] - ends[0])

    async def _phase(self, rate: float, num_text: int, fields: Fields) -> dict[str, Any]:
        waiting, defaults = [0], [CEILING]

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.5)
                waiting.append(await self._metric("vllm:num_requests_waiting"))
                defaults.append(await self._metric("ficoco:default_budget_tokens"))

        watcher = asyncio.create_task(watch())
        answers = await self._arrive(rate, fields)
        watcher.cancel()
        seconds = [seconds for seconds, _ in answers]
        quarter = max(1, len(seconds) // 4)
        return {
            "num_requests": len(answers),
            "early_ttft_seconds": median(seconds[:quarter]),
            "late_ttft_seconds": median(seconds[-quarter:]),
            "longest_queue": max(waiting),
            "budgets": sorted({num_prompt_tokens - num_text for _, num_prompt_tokens in answers}),
            "lowest_default": min(defaults),
        }

    async def _arrive(self, rate: float, fields: Fields) -> list[tuple[float, int]]:
        """Send requests at Poisson arrivals, independent of the server; the answers in order of arrival."""
        seconds = self.length.overload_seconds
        # On a slow machine few requests arrive in a phase; a queue shows in two dozen.
        seconds = max(seconds, min(_FEWEST_ARRIVALS / rate, 3 * seconds))
        begin, tasks, due = time.monotonic(), [], self.random.expovariate(rate)
        while due < seconds:
            await asyncio.sleep(max(0.0, begin + due - time.monotonic()))
            tasks.append(asyncio.create_task(self._ask(fields)))
            due += self.random.expovariate(rate)
        return list(await asyncio.gather(*tasks))

    async def _calm(self) -> None:
        """Send one request after the other until the default is the ceiling."""
        deadline = time.monotonic() + 30 + 4 * self.length.max_release_seconds
        while await self._metric("ficoco:default_budget_tokens") < CEILING:
            if time.monotonic() > deadline:
                raise TimeoutError("the budget has not returned to the ceiling")
            await self._ask({})
            await asyncio.sleep(0.5)

    async def _metric(self, name: str) -> int:
        return int(await asyncio.to_thread(metric, self.url, name))
