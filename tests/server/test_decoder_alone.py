"""The field `ficoco` where the decoder alone reduces, within what the operator allows."""

import asyncio
from statistics import fmean
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from PIL import Image

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from tests.server.conftest import KEEP, NUM_PATCHES, Bounded
from tests.support.server import API_KEY, VALUE_BYTES, data_url, message

NUM_LAYERS = 8
LAYER_BYTES = 2 * 2 * 32 * VALUE_BYTES  # keys and values, heads, head size

pytestmark = pytest.mark.server


def chat(num_images: int = 1, **extra_body: Any) -> dict[str, Any]:
    """Arguments of a greedy chat."""
    urls = [data_url(Image.new("RGB", (64, 64), (40 * index, 90, 160))) for index in range(num_images)]
    messages = [message("what is this?", urls)]
    return {
        "model": "small",
        "messages": messages,
        "max_tokens": 3,
        "temperature": 0,
        "extra_body": extra_body,
    }


def reported(method: str, keep: int, num_images: int = 1) -> dict[str, Any]:
    """Usage according to the plan, for images that enter the decoder unreduced."""
    planner = DecoderPlanner.shared(FicocoConfig.parse({"method": "ficoco-l"}), NUM_LAYERS, NUM_PATCHES)
    counts = planner.counts(method, NUM_PATCHES, keep)
    missing = sum(NUM_PATCHES - count for count in counts) * NUM_LAYERS // len(counts)
    return {
        "method": method,
        "visual_tokens": NUM_PATCHES * num_images,
        "visual_tokens_kept": keep * num_images,
        "kv_bytes_saved": missing * LAYER_BYTES * num_images,
    }


@pytest.mark.parametrize(
    ("ficoco", "method", "keep"),
    [
        (None, "ficoco-l", KEEP),
        ({}, "ficoco-l", KEEP),
        ({"keep": 40}, "ficoco-l", 40),
        ({"keep": 4}, "ficoco-l", 4),
        ({"method": "fastv", "keep": 36}, "fastv", 36),
        ({"method": "fastv"}, "fastv", KEEP),
    ],
)
def test_requested_and_reported(bounded: Bounded, ficoco: Any, method: str, keep: int) -> None:
    with bounded.server.client() as client:
        answer = client.chat.completions.create(**chat(**({} if ficoco is None else {"ficoco": ficoco})))
        whole = client.chat.completions.create(**chat())
    assert answer.usage is not None
    assert whole.usage is not None
    assert answer.usage.model_extra == {"ficoco": reported(method, keep)}
    # The prompt has all tokens, independent of the decoder.
    assert answer.usage.prompt_tokens == whole.usage.prompt_tokens > NUM_PATCHES


def test_kv_budget_is_an_average_over_layers(bounded: Bounded) -> None:
    with bounded.server.client() as client:
        usage = client.chat.completions.create(**chat(ficoco={"kv_budget": 110})).usage
    assert usage is not None
    result = (usage.model_extra or {})["ficoco"]
    keep = result["visual_tokens_kept"]
    assert result == reported("ficoco-l", keep)
    planner = DecoderPlanner.shared(FicocoConfig.parse({"method": "ficoco-l"}), NUM_LAYERS, NUM_PATCHES)
    means = [fmean(planner.counts("ficoco-l", NUM_PATCHES, count)) for count in (keep, keep + 1)]
    assert means[0] <= 110 < means[1]


def test_streams_of_the_asynchronous_client(bounded: Bounded) -> None:
    async def ask() -> tuple[str, list[Any]]:
        client = AsyncOpenAI(base_url=f"{bounded.server.url}/v1", api_key=API_KEY, max_retries=0)
        async with client:
            stream = await client.chat.completions.create(
                **chat(2, ficoco={"keep": 20}), stream=True, stream_options={"include_usage": True}
            )
            chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        return text, [chunk.usage for chunk in chunks]

    text, usages = asyncio.run(ask())
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1].model_extra == {"ficoco": reported("ficoco-l", 20, 2)}
    with bounded.server.client() as client:
        answer = client.chat.completions.create(**chat(2, ficoco={"keep": 20}))
    assert answer.choices[0].message.content == text


@pytest.mark.parametrize(
    ("extra_body", "param", "words"),
    [
        ({"ficoco": {"method": "sparsevlm"}}, "ficoco.method", "allowed: fastv, ficoco-l"),
        ({"ficoco": {"method": "ficoco-v"}}, "ficoco.method", "allowed: fastv, ficoco-l"),
        ({"ficoco": "off"}, "ficoco", "ficoco = 'off' is not allowed; allowed: ficoco-l, fastv"),
        ({"ficoco": {"method": "off"}}, "ficoco", "allowed: ficoco-l, fastv"),
        ({"ficoco": {"keep": NUM_PATCHES}}, "ficoco.keep", "fewer than all"),
        ({"ficoco": {"keep": 3}}, "ficoco.keep", f"an integer from 4 to {NUM_PATCHES}"),
        ({"ficoco": {"kv_budget": 1}}, "ficoco.kv_budget", "ficoco.kv_budget = 1"),
        ({"vllm_xargs": {"ficoco_method": "sparsevlm"}}, "vllm_xargs.ficoco_method", "ficoco-l, fastv"),
        ({"vllm_xargs": {"ficoco_keep": 3}}, "vllm_xargs.ficoco_keep", "an integer from 4"),
        ({"vllm_xargs": {"ficoco_keep": NUM_PATCHES}}, "vllm_xargs.ficoco_keep", "fewer than all"),
        (
            {"ficoco": {"keep": 9}, "vllm_xargs": {"ficoco_keep": 9}},
            "vllm_xargs.ficoco_keep",
            "together with ficoco",
        ),
        ({"mm_processor_kwargs": {"ficoco_keep": 64}}, "mm_processor_kwargs", "--trust-request-mm-kwargs"),
    ],
    ids=str,
)
def test_what_the_operator_does_not_allow(
    bounded: Bounded, extra_body: dict[str, Any], param: str, words: str
) -> None:
    with bounded.server.client() as client, pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**chat(**extra_body))
    body = caught.value.body
    assert isinstance(body, dict)
    assert (body["code"], body["param"]) == (400, param)
    assert words in body["message"]
    assert bounded.server.is_healthy()
