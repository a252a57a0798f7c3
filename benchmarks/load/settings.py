"""What a load test runs: servers, traffic, and the order in which they take turns."""

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES

STOCK = "stock"
_LEAST = {"concurrency": 1, "num_requests": 2, "num_text_tokens": 1, "num_answer_tokens": 2, "image_side": 1}


@dataclass(frozen=True)
class Server:
    """A kind of server: a method and its tokens kept (None: its default), or, without one, vLLM without our plugin."""

    name: str
    method: str | None = None
    keep: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Server":
        """Read `stock`, `METHOD` or `METHOD:KEEP`; anything else is a ValueError that names what is allowed."""
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


@dataclass(frozen=True)
class Traffic:
    """The requests of one point: one image and some text each, images never seen before.

    Attributes:
        rate: requests per second (Poisson); None: as fast as `concurrency` lets them.
        concurrency: open requests of the client; None does not limit them.
        num_text_tokens: number of text tokens of a prompt, in addition to the image.
        num_answer_tokens: exact number of each answer.
        image_side: side of the square images, in pixels.
    """

    rate: float | None = None
    concurrency: int | None = None
    num_requests: int = 64
    num_text_tokens: int = 60
    num_answer_tokens: int = 32
    image_side: int = 336

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value} is not allowed; allowed: an integer of at least {least}")
        if self.rate is not None and not 0 < self.rate < math.inf:
            raise ValueError(f"rate = {self.rate} is not allowed; allowed: a number above 0")

    @property
    def name(self) -> str:
        """Short and unique among the points of a run."""
        return f"concurrency {self.concurrency}" if self.rate is None else f"{self.rate:g} requests/s"


class Turn(NamedTuple):
    """One server's turn: points of traffic, each with the seed of its prompts and images, in order."""

    round_index: int
    server: Server
    points: tuple[tuple[Traffic, int], ...]


@dataclass(frozen=True)
class Target:
    """What is served, and how.

    Attributes:
        model: folder or name.
        name: name of the model in requests.
        tokenizer: folder or name, for prompts of a known length; None leaves their length to the server's `/tokenize`.
        options: options of vLLM's server, the same for every server.
        api_key: key of a server that is up, or empty.
    """

    model: str
    name: str
    tokenizer: str | None
    options: tuple[str, ...]
    log_folder: Path
    api_key: str = ""
    sample_seconds: float = 0.5


def make_turns(servers: list[Server], points: list[Traffic], num_rounds: int, seed: int) -> list[Turn]:
    """Servers in a new random order in every round; in a round all see the same prompts and images.

    Each round and point has prompts and images of its own, so that no cache holds them.
    """
    order = random.Random(seed)
    turns = []
    for round_index in range(num_rounds):
        seeded = [(traffic, order.getrandbits(31)) for traffic in points]
        for server in order.sample(servers, len(servers)):
            turns.append(Turn(round_index, server, tuple(order.sample(seeded, len(seeded)))))
    return turns
