"""Whether a server does what it is said to do, from one question asked as users ask and once more without reduction."""

import base64
import io
from collections.abc import Mapping
from typing import Any

from openai import BadRequestError, OpenAI
from PIL import Image

from ficoco_vllm.benchmarks.accuracy.client import served_model
from ficoco_vllm.benchmarks.accuracy.variants import site_of

PLAIN: Mapping[str, Any] = {}
OFF: Mapping[str, Any] = {"ficoco": "off"}


def probe(url: str, api_key: str, method: str | None, keep: int | None) -> list[str]:
    """Ask one question twice and compare.

    Args:
        url: of the server, without a path.
        api_key: of the server.
        method: that it is said to run, or None: no reduction.
        keep: visual tokens that it is said to keep, or None: not said.

    Returns:
        A line for each sign that it does something else. Where the operator forbids requests to turn the reduction
        off there is nothing to compare with, and what the server tells is believed.

    Raises:
        openai.APIError: the server does not answer.
    """
    with OpenAI(base_url=f"{url}/v1", api_key=api_key, timeout=600) as client:
        model = served_model(url, api_key)
        plain = _ask(client, model, PLAIN)
        try:
            off = _ask(client, model, OFF)
        except BadRequestError:
            off = None
    told = plain.usage.model_dump().get("ficoco") or {}
    found = told.get("method", "off")
    if found != (method or "off"):
        return [f"the server says that it reduces by {found}, not by {method or 'off'}"]
    if method is None:
        saved = 0 if off is None else off.usage.prompt_tokens - plain.usage.prompt_tokens
        return [f"prompts are shorter by {saved} tokens than without reduction"] if saved else []
    kept = told["visual_tokens_kept"]
    if keep is not None and kept != keep:
        return [f"the server says that it keeps {kept} visual tokens, not {keep}"]
    if off is None:
        return []
    if site_of(method) == "tower":
        saved = off.usage.prompt_tokens - plain.usage.prompt_tokens
        expected = told["visual_tokens"] - kept
        if saved != expected:
            return [f"prompts are shorter by {saved} tokens than without reduction, not by {expected}"]
    if _likely(plain) == _likely(off):
        return ["the log-probabilities are those without reduction"]
    return []


def _ask(client: OpenAI, model: str, fields: Mapping[str, Any]) -> Any:
    buffer = io.BytesIO()
    # Every patch is another colour, so that it matters which of them stay.
    Image.radial_gradient("L").convert("RGB").save(buffer, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    content: Any = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is in the image?"},
    ]
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=1,
        logprobs=True,
        top_logprobs=20,
        extra_body=dict(fields),
    )


def _likely(answer: Any) -> dict[str, float]:
    (first,) = answer.choices[0].logprobs.content
    return {entry.token: entry.logprob for entry in first.top_logprobs}
