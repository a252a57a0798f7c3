"""Sends one request and says in which of the allowed ways it ended, if in one."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from itertools import pairwise
from typing import Any

import httpx

from ficoco_vllm.benchmarks.endurance.asks import CHAT, EARLY, MID, Ask

# How a request may end.
ANSWERED, REFUSED, ABORTED = "answered", "refused", "aborted"
# How none may: no answer, more than one, an error of the server, or anything else that was not asked for.
LOST, TWICE, SERVER_ERROR, WRONG = "lost", "twice", "server-error", "wrong"
FAULTS = (LOST, TWICE, SERVER_ERROR, WRONG)
# After so long a request counts as lost.
LOST_SECONDS = 180.0
# Clients that do not wait for their answer go away so soon, in turn.
PATIENCE_SECONDS = (0.002, 0.01, 0.03, 0.1, 0.3)
# Of logits near 10 in bfloat16, which are 0.0625 apart: two likeliest words that close may change places with the
# shape of the batch.
TIE = 0.125
PREFIX = "chatcmpl-"


@dataclass(frozen=True)
class Answer:
    """What was said, and how sure it was.

    Attributes:
        tokens: words.
        gaps: of each, how much likelier it was than the next likely one, in log-probability.
    """

    tokens: tuple[str, ...]
    gaps: tuple[float, ...]

    def agrees(self, other: "Answer") -> bool:
        """Whether another answer says the same up to the first word that was as good as tied here."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return self.gaps[index] <= TIE
        return len(self.tokens) == len(other.tokens)


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
        kind: `ANSWERED`, `REFUSED`, `ABORTED` or one of `FAULTS`.
        why: of a fault.
        answer: of a sample.
    """

    kind: str
    why: str = ""
    answer: Answer | None = None


class Client:
    """Of one server."""

    def __init__(
        self, url: str, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """Send to a server.

        Args:
            url: without a path.
            api_key: of it.
            transport: between client and server; None: the network.
        """
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        transport = transport or httpx.AsyncHTTPTransport(limits=limits)
        self._http = httpx.AsyncClient(
            base_url=url, headers=headers, timeout=LOST_SECONDS, transport=transport
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._http.aclose()

    async def send(self, ask: Ask, name: str, number: int = 0) -> Outcome:
        """Send a request and see how it ends.

        Args:
            ask: what to send.
            name: of the request, none else's: the answer must carry it.
            number: of the request, which decides how patient an impatient client is.
        """
        patience = PATIENCE_SECONDS[number % len(PATIENCE_SECONDS)] if ask.abort == EARLY else None
        try:
            async with asyncio.timeout(patience):
                return await self._exchange(ask, name)
        except TimeoutError:
            return Outcome(ABORTED)
        except httpx.HTTPError as error:
            return Outcome(LOST, repr(error))

    async def metrics(self) -> str:
        """`/metrics` as text."""
        answer = await self._http.get("/metrics")
        answer.raise_for_status()
        return answer.text

    async def _exchange(self, ask: Ask, name: str) -> Outcome:
        headers = {"X-Request-Id": name}
        async with self._http.stream("POST", CHAT, content=ask.body, headers=headers) as response:
            if response.status_code != HTTPStatus.OK:
                return judge_error(ask, response.status_code, await response.aread())
            if not ask.stream:
                return judge_whole(ask, name, await response.aread())
            lines = []
            async for line in response.aiter_lines():
                if line:
                    lines.append(line)
                # The first piece names the role alone.
                if ask.abort == MID and len(lines) > 3:
                    return Outcome(ABORTED)
            return judge_stream(ask, name, lines)


def judge_error(ask: Ask, status: int, body: bytes) -> Outcome:
    """An answer that is none must be the expected refusal, in OpenAI's form."""
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        code = None
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Outcome(SERVER_ERROR, f"{status} {body[:300]!r}")
    if status != ask.status or code != status:
        return Outcome(WRONG, f"{status} {body[:300]!r} instead of {ask.status}")
    return Outcome(REFUSED)


def judge_whole(ask: Ask, name: str, body: bytes) -> Outcome:
    """An answer in one piece: ours, one, and as long as was asked for."""
    try:
        found = json.loads(body)
    except ValueError:
        return Outcome(TWICE if body.count(b'"choices"') > 1 else WRONG, repr(body[:300]))
    return _judge(ask, name, [found["id"]], found["choices"], [found["usage"]])


def judge_stream(ask: Ask, name: str, lines: Sequence[str]) -> Outcome:
    """An answer in pieces: the same, with one end, one account of tokens and `[DONE]` behind all."""
    events = [line.removeprefix("data: ") for line in lines]
    if events.count("[DONE]") > 1:
        return Outcome(TWICE, "two [DONE]")
    if not events or events[-1] != "[DONE]":
        return Outcome(LOST, f"the stream broke off after {len(events)} pieces")
    chunks: list[dict[str, Any]] = [json.loads(event) for event in events[:-1]]
    for chunk in chunks:
        if "error" in chunk:
            return Outcome(SERVER_ERROR, repr(chunk))
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    usages = [chunk["usage"] for chunk in chunks if chunk.get("usage")]
    return _judge(ask, name, [chunk["id"] for chunk in chunks], ends, usages)


def _judge(
    ask: Ask,
    name: str,
    ids: Sequence[str],
    choices: Sequence[dict[str, Any]],
    usages: Sequence[dict[str, Any]],
) -> Outcome:
    if ask.status != HTTPStatus.OK:
        return Outcome(WRONG, f"200 instead of {ask.status}")
    if len(choices) > 1 or len(usages) > 1:
        return Outcome(TWICE, f"{len(choices)} ends, {len(usages)} accounts")
    if len(choices) < 1 or len(usages) < 1:
        return Outcome(LOST, f"{len(choices)} ends, {len(usages)} accounts")
    if ids[0] != PREFIX + name or any(one != other for one, other in pairwise(ids)):
        return Outcome(WRONG, f"an answer to {set(ids)} instead of {name}")
    num_tokens, reason = usages[0]["completion_tokens"], choices[0]["finish_reason"]
    if ask.num_tokens is not None and (num_tokens, reason) != (ask.num_tokens, "length"):
        return Outcome(WRONG, f"{num_tokens} tokens, {reason}, instead of {ask.num_tokens}")
    return Outcome(ANSWERED, answer=_answer(choices[0]) if ask.sample is not None else None)


def _answer(choice: dict[str, Any]) -> Answer:
    words = choice["logprobs"]["content"]
    likeliest = [[top["logprob"] for top in word["top_logprobs"]] for word in words]
    return Answer(
        tokens=tuple(word["token"] for word in words),
        gaps=tuple(max(tops) - min(tops) for tops in likeliest),
    )
