"""The requests of `make soak`: images and text, methods and budgets, streams, aborts, and what must be refused."""

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from http import HTTPStatus
from itertools import starmap
from typing import Any

from PIL import Image

from ficoco_vllm.benchmarks.harness.http import chat, data_url
from ficoco_vllm.demo_model import examples

CHAT = "/v1/chat/completions"
# Requests before the mixture repeats: caches that grow with every new prompt would hide a leak.
NUM_DIFFERENT = 240
MOST_TOKENS = 8
# Width and height: one pixel, slivers, larger than any tower's view, odd.
ODD_SIZES = ((1, 1), (1, 200), (600, 3), (577, 63), (193, 191), (1100, 700))
SHARES = {"image": 0.34, "two": 0.1, "odd": 0.1, "text": 0.16, "sample": 0.14, "refused": 0.16}
STREAM_SHARE, ABORT_SHARE = 0.5, 0.3
# When the client disconnects: before the first token, or with more to come.
EARLY, MID = "early", "mid"


@dataclass(frozen=True)
class Target:
    """Limits of a server, as far as the mixture depends on them.

    Attributes:
        budgets: visual tokens of an image that requests may name.
        num_patches: visual tokens of an image without reduction.
        max_images: most images of a prompt; more must be refused; None: not tested.
        max_body_bytes: most bytes of a request; more must be refused; None: not tested.
        allows_off: whether requests may keep all tokens.
    """

    model: str
    methods: tuple[str, ...]
    budgets: tuple[int, ...]
    num_patches: int
    max_images: int | None
    max_body_bytes: int | None
    max_model_len: int
    allows_off: bool = True


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        stream: whether the answer is streamed.
        num_tokens: number of tokens of the answer, exactly; None where the model ends it.
        abort: None, `EARLY` or `MID`: when the client disconnects.
        sample: index among the questions whose answers are compared with those to the same question sent alone.
        counted_refusal: whether `ficoco:requests_total` counts it as refused.
    """

    name: str
    body: bytes
    status: int = HTTPStatus.OK
    stream: bool = False
    num_tokens: int | None = None
    abort: str | None = None
    sample: int | None = None
    counted_refusal: bool = False


def make_requests(target: Target, seed: int, count: int = NUM_DIFFERENT) -> list[Request]:
    """The mixture, the same for the same arguments."""
    order, refusals = random.Random(seed), _refusals(target)
    # Exact shares in a random order, so that even a short run has every kind.
    numbered = [(kind, n) for kind, share in SHARES.items() for n in range(round(share * count))]
    order.shuffle(numbered)

    def make(kind: str, number: int) -> Request:
        if kind == "refused":
            return refusals[number % len(refusals)]
        return _sample(target, number) if kind == "sample" else _answered(target, order, kind, number)

    return list(starmap(make, numbered))


@cache
def _examples() -> list[tuple[str, str]]:
    """Questions, and their images as data URLs."""
    return [(example.question, data_url(example.image.read_bytes())) for example in examples()]


def _sample(target: Target, number: int) -> Request:
    """A question whose answer the demo model ends by itself; methods and budgets in turn."""
    index = number % (len(_examples()) * 2)
    question, url = _examples()[index % len(_examples())]
    method, keep = (choices[index % len(choices)] for choices in (target.methods, target.budgets))
    # With log-probabilities, which show ties.
    more = {"logprobs": True, "top_logprobs": 2, "ficoco": {"method": method, "keep": keep}}
    body = _bytes(target, question, [url], max_tokens=MOST_TOKENS, **more)
    return Request("sample", body, sample=index)


def _answered(target: Target, order: random.Random, kind: str, number: int) -> Request:
    (question, first), (_, second) = order.sample(_examples(), 2)
    odd = data_url(Image.linear_gradient("L").resize(ODD_SIZES[number % len(ODD_SIZES)]))
    urls = {"image": [first], "two": [first, second], "odd": [odd], "text": []}[kind]
    stream = order.random() < STREAM_SHARE
    abort = None
    if order.random() < ABORT_SHARE:
        abort = MID if stream and number % 2 else EARLY
    num_tokens = 200 if abort == MID else order.randint(1, MOST_TOKENS)
    more: dict[str, Any] = {"ignore_eos": True}
    choice = order.randrange(6)
    if urls and choice == 0 and target.allows_off:
        more["ficoco"] = "off"
    elif urls and choice < 5:
        more["ficoco"] = {"method": order.choice(target.methods), "keep": order.choice(target.budgets)}
    if stream:
        more |= {"stream": True, "stream_options": {"include_usage": True}}
    body = _bytes(target, question, urls, max_tokens=num_tokens, **more)
    return Request(kind, body, stream=stream, num_tokens=num_tokens, abort=abort)


def _refusals(target: Target) -> list[Request]:
    """Every kind of request that a client may send by mistake and the server refuses."""
    question, url = _examples()[0]
    image = base64.b64decode(url.partition(",")[2])

    def refused(
        status: int = HTTPStatus.BAD_REQUEST, urls: Sequence[str] = (url,), text: str = question, **more: Any
    ) -> Request:
        body = _bytes(target, text, urls, **more)
        return Request("refused", body, status=status, counted_refusal="ficoco" in more)

    refusals = [
        refused(ficoco={"keep": target.num_patches + 1}),
        refused(ficoco={"method": "none-of-this-name"}),
        refused(ficoco={"keep": "many"}),
        refused(urls=[data_url(image[: len(image) // 2])]),
        refused(urls=[data_url(b"no image at all")]),
        refused(urls=["data:image/png;base64,%%%"]),
        refused(urls=[data_url(b"P6 30000 30000 255\n", "image/x-portable-pixmap")]),
        refused(urls=["http://127.0.0.1:9/image.png"]),
        refused(max_tokens=-1),
        refused(HTTPStatus.NOT_FOUND, model="another"),
        refused(urls=[], text="a red sign " * target.max_model_len),
        Request("refused", b'{"model": ', status=HTTPStatus.BAD_REQUEST),
        Request("refused", b"", status=HTTPStatus.BAD_REQUEST),
    ]
    if target.max_images is not None:
        refusals.append(refused(urls=[url] * (target.max_images + 1)))
    if target.max_body_bytes is not None:
        refusals.append(refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, [], "a" * target.max_body_bytes))
    return refusals


def _bytes(target: Target, question: str, urls: Sequence[str], **more: Any) -> bytes:
    return json.dumps(chat(target.model, question, urls) | more).encode()
