"""Client of a server under test: classifies how each request ended."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

import httpx

from ficoco_vllm.benchmarks.soak.server.mixture import CHAT, EARLY, MID, Request

# How a request may end.
ANSWERED, REFUSED, ABORTED = "answered", "refused", "aborted"
# Faults: no answer, more than one, an error of the server, or any other answer than the expected one.
LOST, TWICE, SERVER_ERROR, WRONG = "lost", "twice", "server-error", "wrong"
FAULTS = (LOST, TWICE, SERVER_ERROR, WRONG)
# Without an answer for so long, a request counts as lost.
LOST_SECONDS = 180.0
# Clients that do not wait for their answer disconnect after one of these, in turn.
PATIENCE_SECONDS = (0.002, 0.01, 0.03, 0.1, 0.3)
# Logits near 10 in bfloat16 are 0.0625 apart: two most likely words that are this close may swap with the shape of the
# batch.
TIE = 0.125
PREFIX = "chatcmpl-"


@dataclass(frozen=True)
class Answer:
    """Tokens of an answer, and the difference in log-probability of each to the next likely one."""

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]

    def agrees(self, other: "Answer") -> bool:
        """Whether another answer is the same up to the first word that is nearly tied in this one."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return self.gaps[index] <= TIE
        return len(self.tokens) == len(other.tokens)


@dataclass(frozen=True)
class Outcome:
    """How a request ended: its kind is `ANSWERED`, `REFUSED`, `ABORTED` or one of `FAULTS`."""

    kind: str
    why: str = ""
    answer: Answer | None = None


class Client(httpx.AsyncClient):
    """Client of one server, at an address without a path."""

    def __init__(
        self, url: str, api_key: str = "none", transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        super().__init__(
            base_url=url, headers=headers, timeout=LOST_SECONDS, limits=limits, transport=transport
        )

    async def ask(self, request: Request, number: int = 0) -> Outcome:
        """Send a request and classify its end; its number decides how long a client waits that disconnects early."""
        patience = PATIENCE_SECONDS[number % len(PATIENCE_SECONDS)] if request.abort == EARLY else None
        try:
            async with asyncio.timeout(patience):
                return await self._exchange(request, name=uuid4().hex)
        except TimeoutError:
            return Outcome(ABORTED)
        except httpx.HTTPError as error:
            return Outcome(LOST, repr(error))

    async def metrics(self) -> str:
        """`/metrics` as text."""
        return (await self.get("/metrics")).raise_for_status().text

    async def _exchange(self, request: Request, name: str) -> Outcome:
        headers = {"X-Request-Id": name}
        async with self.stream("POST", CHAT, content=request.body, headers=headers) as response:
            if response.status_code != HTTPStatus.OK:
                return judge_error(request, response.status_code, await response.aread())
            if not request.stream:
                return judge_whole(request, name, await response.aread())
            lines = []
            async for line in response.aiter_lines():
                if line:
                    lines.append(line)
                # The first event has the role alone.
                if request.abort == MID and len(lines) > 3:
                    return Outcome(ABORTED)
            return judge_stream(request, name, lines)


def judge_error(request: Request, status: int, body: bytes) -> Outcome:
    """Classify an error: it must be the expected refusal, in OpenAI's form."""
    code = None
    with suppress(ValueError, KeyError, TypeError):
        code = json.loads(body)["error"]["code"]
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Outcome(SERVER_ERROR, f"{status} {body[:300]!r}")
    if status != request.status or code != status:
        return Outcome(WRONG, f"{status} {body[:300]!r} instead of {request.status}")
    return Outcome(REFUSED)


def judge_whole(request: Request, name: str, body: bytes) -> Outcome:
    """Classify a whole answer: exactly one, to this request, of the requested length."""
    try:
        answer = json.loads(body)
    except ValueError:
        return Outcome(TWICE if body.count(b'"choices"') > 1 else WRONG, repr(body[:300]))
    return _judge(request, name, [answer])


def judge_stream(request: Request, name: str, lines: Sequence[str]) -> Outcome:
    """Classify a stream: as a whole answer, with one end, one usage and a last `[DONE]`."""
    events = [line.removeprefix("data: ") for line in lines]
    if events.count("[DONE]") > 1:
        return Outcome(TWICE, "two [DONE]")
    if not events or events[-1] != "[DONE]":
        return Outcome(LOST, f"the stream ended after {len(events)} events")
    chunks = [json.loads(event) for event in events[:-1]]
    for chunk in chunks:
        if "error" in chunk:
            return Outcome(SERVER_ERROR, repr(chunk))
    return _judge(request, name, chunks)


def _judge(request: Request, name: str, chunks: Sequence[dict[str, Any]]) -> Outcome:
    """Classify an answer, whole or in chunks."""
    if request.status != HTTPStatus.OK:
        return Outcome(WRONG, f"200 instead of {request.status}")
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    if (len(ends), len(usages)) != (1, 1):
        kind = TWICE if max(len(ends), len(usages)) > 1 else LOST
        return Outcome(kind, f"{len(ends)} ends, {len(usages)} usages")
    names = {chunk["id"] for chunk in chunks}
    if names != {PREFIX + name}:
        return Outcome(WRONG, f"an answer to {names} instead of {name}")
    num_tokens, reason = usages[0]["completion_tokens"], ends[0]["finish_reason"]
    if request.num_tokens is not None and (num_tokens, reason) != (request.num_tokens, "length"):
        return Outcome(WRONG, f"{num_tokens} tokens, {reason}, instead of {request.num_tokens}")
    if request.sample is None:
        return Outcome(ANSWERED)
    words = ends[0]["logprobs"]["content"]
    likeliest = [[top["logprob"] for top in word["top_logprobs"]] for word in words]
    gaps = tuple(max(tops) - min(tops) for tops in likeliest)
    return Outcome(ANSWERED, answer=Answer(tuple(word["token"] for word in words), gaps))
