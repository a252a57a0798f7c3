"""Requests to a server: images and chats in the form of OpenAI's API, answers timed, and `/metrics`."""

import base64
import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from prometheus_client.samples import Sample

# A server that is up lists its models at once; a busy one may take seconds.
_PROBE_SECONDS = 30


def png(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def data_url(image: Image.Image | bytes, media_type: str = "image/png") -> str:
    """An image, or any bytes that claim to be one, as a data URL."""
    data = png(image) if isinstance(image, Image.Image) else image
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def message(text: str, urls: Sequence[str] = ()) -> dict[str, Any]:
    """One message of a user, images first."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def chat(model: str, text: str, urls: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """Body of a greedy chat completion; `more` are other fields."""
    return {"model": model, "messages": [message(text, urls)], "temperature": 0, **more}


def check_answers(url: str) -> None:
    """Check that something answers at a URL without a path, before anything is prepared for it.

    Raises:
        RuntimeError: nothing does.
    """
    try:
        urllib.request.urlopen(f"{url}/v1/models", timeout=_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return  # of a server that wants its API key, or has no such route
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RuntimeError(f"no answer from {url} ({getattr(error, 'reason', error)})") from error


def served_model(url: str, api_key: str = "none") -> str:
    """Name of the first model that a server offers.

    Raises:
        RuntimeError: nothing answers at the URL.
        openai.APIError: the server refuses.
    """
    check_answers(url)
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key=api_key) as client:
        return next(iter(client.models.list())).id


async def first_token(client: "AsyncOpenAI", body: dict[str, Any]) -> tuple[float, int]:
    """Send one chat and read its answer as a stream: seconds until the first token, and tokens of the prompt."""
    begin, seconds, num_prompt_tokens = time.perf_counter(), None, 0
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    stream: Any = await client.chat.completions.create(**body, **options)
    async for chunk in stream:
        # The first chunk names the role; it comes with the first token, and its text is empty.
        if seconds is None and chunk.choices and chunk.choices[0].delta.content is not None:
            seconds = time.perf_counter() - begin
        if chunk.usage is not None:
            num_prompt_tokens = chunk.usage.prompt_tokens
    assert seconds is not None
    return seconds, num_prompt_tokens


def read_metrics(url: str) -> str:
    """The text of `/metrics` of the server at a URL without a path."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return str(answer.read().decode())


def samples(text: str) -> Iterator["Sample"]:
    """Every sample in the text of `/metrics`."""
    # Not at the top: the command line loads this module, and a process that serves names the folder of the metrics that
    # processes share before prometheus_client is imported.
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        yield from family.samples


def metric(url: str, name: str) -> float:
    """Sum of one metric of the server at a URL over its labels."""
    return sum(sample.value for sample in samples(read_metrics(url)) if sample.name == name)
