"""The field `ficoco` of requests to a server of the tower, and the reported usage."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from PIL import Image

from ficoco_vllm.demo_model import examples
from tests.support.server import API_KEY, DEMO_KEEP, VALUE_BYTES, Server, data_url, message

MODEL = "ficoco-demo"
NUM_PATCHES = 576
TOKEN_BYTES = 8 * 2 * 4 * 32 * VALUE_BYTES  # layers, keys and values, heads, head size

pytestmark = [pytest.mark.compat, pytest.mark.server]


def body(ficoco: Any, num_images: int = 1, **more: Any) -> dict[str, Any]:
    """A chat about the example images."""
    urls = [data_url(Image.open(example.image)) for example in examples()[:num_images]]
    chat = {
        "model": MODEL,
        "messages": [message(examples()[0].question, urls)],
        "max_tokens": 8,
        "temperature": 0,
    }
    return chat | ({} if ficoco is None else {"ficoco": ficoco}) | more


def post(server: Server, path: str, content: dict[str, Any]) -> httpx.Response:
    """Ask without a client's help."""
    headers = {"Authorization": f"Bearer {API_KEY}"}
    return httpx.post(f"{server.url}{path}", json=content, headers=headers, timeout=300)


def reported(method: str, kept: int, num_images: int = 1) -> dict[str, Any]:
    """Expected usage."""
    missing = num_images * (NUM_PATCHES - kept)
    return {
        "method": method,
        "visual_tokens": num_images * NUM_PATCHES,
        "visual_tokens_kept": num_images * kept,
        "kv_bytes_saved": missing * TOKEN_BYTES,
    }


@pytest.mark.parametrize(
    ("ficoco", "method", "kept"),
    [
        (None, "ficoco-v", DEMO_KEEP),
        ({}, "ficoco-v", DEMO_KEEP),
        ({"keep": 96}, "ficoco-v", 96),
        ({"method": "tome", "keep": 192}, "tome", 192),
        ({"method": "topk-cls"}, "topk-cls", DEMO_KEEP),
        ({"kv_budget": 100.9}, "ficoco-v", 100),
        ("off", "off", NUM_PATCHES),
        ({"method": "off"}, "off", NUM_PATCHES),
    ],
)
def test_requested_and_reported(server: Server, ficoco: Any, method: str, kept: int) -> None:
    answer = post(server, "/v1/chat/completions", body(ficoco))
    assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    assert usage["ficoco"] == reported(method, kept)
    full = post(server, "/v1/chat/completions", body("off")).json()["usage"]["prompt_tokens"]
    assert usage["prompt_tokens"] == full - NUM_PATCHES + kept
    headers = {name: value for name, value in answer.headers.items() if name.startswith("x-ficoco-")}
    assert headers == {
        f"x-ficoco-{key.replace('_', '-')}": str(value) for key, value in reported(method, kept).items()
    }


def test_official_client_sync_async_and_streaming(server: Server, client: OpenAI) -> None:
    chat = body(None, num_images=2)
    extra = {"extra_body": {"ficoco": {"keep": 96}}}
    expected = reported("ficoco-v", 96, num_images=2)
    completion = client.chat.completions.create(**chat, **extra)
    assert completion.usage is not None
    assert completion.usage.model_extra == {"ficoco": expected}

    async def ask() -> Any:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as asynchronous:
            return await asynchronous.chat.completions.create(**chat, **extra)

    assert asyncio.run(ask()).usage.model_extra == {"ficoco": expected}
    stream = client.chat.completions.with_streaming_response.create(
        **chat, **extra, stream=True, stream_options={"include_usage": True}
    )
    with stream as response:
        assert response.headers["x-ficoco-visual-tokens-kept"] == "192"
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert [chunk["usage"]["ficoco"] for chunk in chunks if chunk.get("usage")] == [expected]
    assert chunks[-1]["usage"]["ficoco"] == expected
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"])
    assert text == completion.choices[0].message.content
    quiet = client.chat.completions.create(**chat, **extra, stream=True)
    assert all(chunk.usage is None for chunk in quiet)

    async def stream_all() -> list[Any]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=API_KEY) as asynchronous:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            return [
                chunk
                async for chunk in await asynchronous.chat.completions.create(**chat, **extra, **options)
            ]

    final_chunks = asyncio.run(stream_all())
    assert [chunk.usage.model_extra for chunk in final_chunks if chunk.usage] == [{"ficoco": expected}]
    assert final_chunks[-1].usage is not None
    words = [chunk.choices[0].delta.content or "" for chunk in final_chunks if chunk.choices]
    assert "".join(words) == text


def test_batch_route_and_completions(server: Server, client: OpenAI) -> None:
    chat = body({"keep": 9})
    chat["messages"] = [chat["messages"], chat["messages"]]
    answer = post(server, "/v1/chat/completions/batch", chat)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["ficoco"] == reported("ficoco-v", 9, num_images=2)
    text = client.completions.create(
        model=MODEL, prompt="what is", max_tokens=2, extra_body={"ficoco": {"keep": 9}}
    )
    assert text.usage is not None
    assert not text.usage.model_extra  # no image: nothing to report
    with pytest.raises(openai.BadRequestError, match=r"ficoco\.keep = 0"):
        client.completions.create(
            model=MODEL, prompt="what is", max_tokens=2, extra_body={"ficoco": {"keep": 0}}
        )


def response_input() -> list[Any]:
    """An image and a question, as the Responses API takes them."""
    image = {"type": "input_image", "image_url": data_url(Image.open(examples()[0].image)), "detail": "auto"}
    return [{"role": "user", "content": [image, {"type": "input_text", "text": examples()[0].question}]}]


def test_responses(client: OpenAI) -> None:
    """The Responses API reads and reports the field too, whole and as a stream."""
    more: dict[str, Any] = {"max_output_tokens": 8, "temperature": 0}
    body: dict[str, Any] = {"model": MODEL, "input": response_input(), **more}
    extra = {"extra_body": {"ficoco": {"method": "tome", "keep": 96}}}
    whole = client.responses.with_raw_response.create(**body, **extra)
    assert whole.headers["x-ficoco-visual-tokens-kept"] == "96"
    answer = whole.parse()
    assert answer.usage is not None
    assert (answer.usage.model_extra or {})["ficoco"] == reported("tome", 96)
    assert examples()[0].answer in answer.output_text
    last = list(client.responses.create(**body, **extra, stream=True))[-1]
    assert last.type == "response.completed"
    assert last.response.usage is not None
    assert (last.response.usage.model_extra or {})["ficoco"] == reported("tome", 96)
    full = client.responses.create(**body, extra_body={"ficoco": "off"})
    assert full.usage is not None
    assert full.usage.input_tokens - answer.usage.input_tokens == NUM_PATCHES - 96
    with pytest.raises(openai.BadRequestError, match=r"ficoco\.keep = 0"):
        client.responses.create(**body, extra_body={"ficoco": {"keep": 0}})


def test_tokens_of_a_chat(server: Server) -> None:
    """`/tokenize` returns the prompt length of the same chat."""
    counts = [
        post(server, "/tokenize", body(ficoco)).json()["count"] for ficoco in ("off", None, {"keep": 9})
    ]
    assert [counts[0] - count for count in counts] == [0, NUM_PATCHES - DEMO_KEEP, NUM_PATCHES - 9]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens", "/inference/v1/generate"])
def test_routes_that_do_not_read_it_say_so(server: Server, path: str) -> None:
    """VLLM would drop unknown fields, and the client would believe that its budget was applied."""
    chat = {"model": MODEL, "messages": [{"role": "user", "content": 'the word "ficoco"'}], "max_tokens": 2}
    without = post(server, path, chat)
    assert without.status_code in (200, 403), without.text  # scale-out routes are off by default
    answer = post(server, path, {**chat, "ficoco": {"keep": 9}})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "ficoco"
    assert (
        f"ficoco is not read by {path}; allowed: without it, or one of /v1/chat/completions"
        in error["message"]
    )


@pytest.mark.parametrize(
    ("ficoco", "param", "words"),
    [
        ("on", "ficoco", "'off', or an object of method, keep, keep_ratio, kv_budget"),
        ([], "ficoco", "'off', or an object"),
        ({"kep": 3}, "ficoco.kep", "allowed: method, keep, keep_ratio, kv_budget"),
        ({"keep": 0}, "ficoco.keep", "ficoco.keep = 0"),
        ({"keep": 577}, "ficoco.keep", "an integer from 1 to 576"),
        ({"keep": 3.5}, "ficoco.keep", "ficoco.keep = 3.5"),
        ({"keep": "64"}, "ficoco.keep", "ficoco.keep = '64'"),
        ({"keep": True}, "ficoco.keep", "ficoco.keep = True"),
        ({"method": "magic"}, "ficoco.method", "'magic'"),
        ({"method": "fastv"}, "ficoco.method", "ficoco-v"),
        ({"kv_budget": -1}, "ficoco.kv_budget", "1.00 to 576.00"),
        ({"kv_budget": 1000}, "ficoco.kv_budget", "1.00 to 576.00"),
        ({"kv_budget": 64, "keep": 64}, "ficoco.kv_budget", "one of them"),
        ({"method": "off", "keep": 64}, "ficoco.method", "no budget"),
    ],
)
def test_refused(server: Server, ficoco: Any, param: str, words: str) -> None:
    answer = post(server, "/v1/chat/completions", body(ficoco))
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]
    assert server.is_healthy()


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"extra_body": {"ficoco": {"keep": 96}}}, "extra_body.ficoco"),
        ({"additional_config": {"ficoco": "off"}}, "additional_config.ficoco"),
        ({"ficoco_keep": 96}, "ficoco_keep"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/v1/messages", "/v1/responses"])
def test_in_another_place(server: Server, path: str, extra: dict[str, Any], param: str) -> None:
    chat = body(None)
    chat["input"] = response_input()
    answer = post(server, path, chat | extra)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert f"{param} is not read" in error["message"]


def test_not_twice(server: Server) -> None:
    raw = {"mm_processor_kwargs": {"ficoco_keep": 64}}
    answer = post(server, "/v1/chat/completions", body({"keep": 64}, **raw))
    assert answer.status_code == 400
    assert "mm_processor_kwargs.ficoco_keep together with ficoco" in answer.json()["error"]["message"]


def test_off_is_stock(server: Server) -> None:
    """The same bits as with all tokens kept, which tests/models/test_stock.py holds against stock vLLM."""
    more = {"logprobs": True, "top_logprobs": 5}
    off = post(server, "/v1/chat/completions", body("off", **more)).json()
    raw = {"mm_processor_kwargs": {"ficoco_keep": NUM_PATCHES}}
    kept = post(server, "/v1/chat/completions", body(None, **raw, **more)).json()
    assert off["choices"] == kept["choices"]


def test_images_are_not_fetched_from_the_network(client: OpenAI, server: Server) -> None:
    for url in ("http://127.0.0.1:1/a.png", "https://example.invalid/a.png", "HTTP://[::1]/a.png"):
        with pytest.raises(openai.BadRequestError, match="not fetched from the network"):
            client.chat.completions.create(model=MODEL, messages=[message("what?", [url])], max_tokens=1)
    assert server.is_healthy()
