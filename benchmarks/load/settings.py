"""What a load test runs: servers, traffic, and the order in which they take turns."""

import math
import random
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES

STOCK = "stock"


class Server(BaseModel):
    """One kind of server.

    Attributes:
        method: of `ficoco-vllm methods`, or None for stock vLLM, which then runs without our plugin.
        keep: visual tokens that an image keeps; None leaves the method's default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    method: str | None = None
    keep: int | None = Field(default=None, ge=1)

    @classmethod
    def parse(cls, text: str) -> "Server":
        """Read `stock`, `METHOD` or `METHOD:KEEP`.

        Raises:
            ValueError: naming the option, its value and what is allowed.
        """
        if text == STOCK:
            return cls(name=STOCK)
        method, colon, keep = text.partition(":")
        known = sorted({*available(), *PIPELINES})
        if method not in known:
            raise ValueError(f"--servers: method {method!r} is not known; allowed: stock, {', '.join(known)}")
        if colon and not (keep.isdigit() and int(keep) >= 1):
            raise ValueError(
                f"--servers: {text!r} is not allowed; allowed: stock, METHOD or METHOD:KEEP with an integer from 1"
            )
        return cls(name=text.replace(":", "-"), method=method, keep=int(keep) if colon else None)


class Traffic(BaseModel):
    """The requests of one point: one image and some text each, images never seen before.

    Attributes:
        rate: requests a second (Poisson); None: as fast as `concurrency` lets them.
        concurrency: open requests of the client; None does not limit them.
        num_text_tokens: of a prompt, beside the image.
        num_answer_tokens: each answer has exactly so many.
        image_side: of the square images, in pixels.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rate: float | None = None
    concurrency: int | None = Field(default=None, ge=1)
    num_requests: int = Field(default=64, ge=2)
    num_text_tokens: int = Field(default=60, ge=1)
    num_answer_tokens: int = Field(default=32, ge=2)
    image_side: int = Field(default=336, ge=1)

    @model_validator(mode="after")
    def _bounded(self) -> "Traffic":
        if self.rate is None and self.concurrency is None:
            raise ValueError("a point needs a rate or a concurrency; got neither")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate = {self.rate} is not allowed; allowed: a number above 0")
        return self

    @property
    def name(self) -> str:
        """Short and unique among the points of a run."""
        if self.rate is None:
            return f"concurrency {self.concurrency}"
        return f"{self.rate:g} requests/s"


@dataclass(frozen=True)
class Turn:
    """One server's turn.

    Attributes:
        points: traffic and the seed of its prompts and images, in the order in which they run.
    """

    round_index: int
    server: Server
    points: tuple[tuple[Traffic, int], ...]


def make_turns(servers: list[Server], points: list[Traffic], num_rounds: int, seed: int) -> list[Turn]:
    """Servers in an order of their own in every round; in a round all see the same prompts and images.

    Args:
        servers: each takes one turn a round.
        points: that each turn runs through.
        num_rounds: at least 1.
        seed: of order, prompts and images; every round and point has its own, so that no cache flatters.
    """
    order = random.Random(seed)
    turns = []
    for round_index in range(num_rounds):
        seeded = [(traffic, order.getrandbits(31)) for traffic in points]
        for server in order.sample(servers, len(servers)):
            turns.append(Turn(round_index, server, tuple(order.sample(seeded, len(seeded)))))
    return turns


def make_points(rates: list[str], concurrencies: list[int], **traffic: Any) -> list[Traffic]:
    """One point for each rate and each concurrency.

    Args:
        rates: numbers, as the command line gives them.
        concurrencies: each is run as fast as it lets the client go.
        **traffic: the other fields of `Traffic`.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    numbers: list[dict[str, Any]] = []
    for text in rates:
        try:
            numbers.append({"rate": float(text)})
        except ValueError as error:
            raise ValueError(f"--rates: {text!r} is not allowed; allowed: numbers above 0") from error
    try:
        return [
            Traffic(**pace, **traffic) for pace in (*numbers, *({"concurrency": n} for n in concurrencies))
        ]
    except ValidationError as error:
        raise ValueError(_first(error)) from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place} = {first['input']!r}: {first['msg']}" if place else first["msg"]
