"""The requests of `make soak-engine`: images and text, methods and budgets mixed, some of them aborted."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import Any

from PIL import Image

from ficoco_vllm.demo_model import examples

METHODS = ("ficoco-l", "fastv", "sparsevlm", "pyramiddrop", "fitprune")
BUDGETS = (576, 288, 64, 9)
# Phases in which a request may be aborted. Few are ever preempted, so every second one of all others is to be aborted
# in that phase.
COMMON_PHASES = ("waiting", "prefilled", "decoding")
PREEMPTED = "preempted"
PHASES = (*COMMON_PHASES, PREEMPTED)
MOST_TOKENS = 16
# Requests before the mixture repeats: caches that libraries keep of new shapes grow for a long time, and would hide a
# leak.
NUM_DIFFERENT = 100
LONG_TEXT = "is there a red sign in the corner of the room? " * 12
TEXT_ONLY, LONG, TWO_IMAGES = 0.2, 0.1, 0.15  # shares of the requests; the others have one image


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: prompt with one `<image>` for each image.
        extra: `vllm_xargs`.
        abort_in: phase in which it is aborted if it reaches it; None: never.
        adapter: number of its LoRA adapter, from 1; 0 for none.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    num_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)
    abort_in: str | None = None
    adapter: int = 0


def make_requests(seed: int, abort_share: float, num_adapters: int = 0) -> Iterator[Request]:
    """Requests without end: the same `NUM_DIFFERENT` repeated, each time with other aborts.

    `abort_share` of the requests are aborted in one of `COMMON_PHASES`; each has one of the adapters, if there are any.
    """
    order = random.Random(seed)
    known = [(example.question, Image.open(example.image).convert("RGB")) for example in examples()]
    different = []
    for _ in range(NUM_DIFFERENT):
        kind = order.random()
        (question, first), (_, second) = order.sample(known, 2)
        if kind < TEXT_ONLY + LONG:
            images: tuple[Image.Image, ...] = ()
            question = question if kind < TEXT_ONLY else LONG_TEXT
        else:
            images = (first, second) if kind > 1 - TWO_IMAGES else (first,)
        extra = {"ficoco_method": order.choice(METHODS), "ficoco_keep": order.choice(BUDGETS)}
        request = Request(
            prompt="<s>USER: " + "<image>\n" * len(images) + question + " ASSISTANT:",
            images=images,
            num_tokens=order.randint(1, MOST_TOKENS),
            extra=extra if images else {},
            adapter=order.randint(1, num_adapters) if num_adapters else 0,
        )
        different.append(request)
    for request in cycle(different):
        phases = COMMON_PHASES if order.random() < abort_share else (PREEMPTED, None)
        yield replace(request, abort_in=order.choice(phases))
