"""Check of a server's method and budget by one question, sent as users send it and once more without reduction."""

from collections.abc import Mapping
from typing import Any

from openai import BadRequestError, OpenAI
from PIL import Image

from ficoco_vllm.benchmarks.accuracy.variants import site_of
from ficoco_vllm.benchmarks.harness.http import chat, data_url, served_model

PLAIN: Mapping[str, Any] = {}
OFF: Mapping[str, Any] = {"ficoco": "off"}


def probe(url: str, api_key: str, method: str | None, keep: int | None) -> list[str]:
    """A line for each sign that a server does not run a method (None: no reduction) with a budget (None: any).

    A server whose operator forbids requests to turn the reduction off cannot be compared with itself; its own report is
    then taken as it is.

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
    reported = plain.usage.model_dump().get("ficoco") or {}
    applied = reported.get("method", "off")
    if applied != (method or "off"):
        return [f"the server says that it reduces by {applied}, not by {method or 'off'}"]
    kept = reported.get("visual_tokens_kept")
    if method is not None and keep not in (None, kept):
        return [f"the server says that it keeps {kept} visual tokens, not {keep}"]
    if off is None:
        return []
    if method is None or site_of(method) == "tower":
        saved = off.usage.prompt_tokens - plain.usage.prompt_tokens
        expected = 0 if method is None else reported["visual_tokens"] - kept
        if saved != expected:
            return [f"prompts are shorter by {saved} tokens than without reduction, not by {expected}"]
    if method is not None and _likely(plain) == _likely(off):
        return ["the log-probabilities are those without reduction"]
    return []


def _ask(client: OpenAI, model: str, fields: Mapping[str, Any]) -> Any:
    # Every patch has another colour, so that it matters which of them are kept.
    image = Image.radial_gradient("L").convert("RGB")
    body: Any = chat(model, "what is in the image?", [data_url(image)], max_tokens=1)
    return client.chat.completions.create(**body, logprobs=True, top_logprobs=20, extra_body=dict(fields))


def _likely(answer: Any) -> dict[str, float]:
    (first,) = answer.choices[0].logprobs.content
    return {entry.token: entry.logprob for entry in first.top_logprobs}
