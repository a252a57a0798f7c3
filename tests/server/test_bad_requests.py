"""Bad input: HTTP 400 in OpenAI's form, naming field, value and what is allowed, and the engine keeps running."""

import base64
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image

from tests.support.pictures import noise
from tests.support.server import Server, budget, data_url, message

MODEL = "ficoco-demo"

pytestmark = [pytest.mark.compat, pytest.mark.server]


def refused(client: OpenAI, url: str, **extra_body: Any) -> dict[str, Any]:
    """The error body of a request that is refused."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL, messages=[message("what is this?", [url])], max_tokens=1, extra_body=extra_body
        )
    body = caught.value.body
    assert isinstance(body, dict)
    assert body["code"] == 400
    assert body["type"] == "BadRequestError"
    return body


@pytest.fixture
def url(images: list[Image.Image]) -> str:
    """A good image."""
    return data_url(images[0])


@pytest.fixture(autouse=True)
def lives_on(server: Server, client: OpenAI, url: str) -> Any:
    """After every refusal the next request is answered."""
    yield
    assert server.is_healthy()
    client.chat.completions.create(model=MODEL, messages=[message("what is this?", [url])], max_tokens=1)


@pytest.mark.parametrize("keep", [0, -3, 577, "64", 3.5, True, [64]])
def test_keep_out_of_range(client: OpenAI, url: str, keep: Any) -> None:
    body = refused(client, url, **budget(keep))
    assert body["param"] == "ficoco_keep"
    assert f"ficoco_keep = {keep!r}" in body["message"]
    assert "an integer from 1 to 576" in body["message"]


def test_unknown_method(client: OpenAI, url: str) -> None:
    body = refused(client, url, mm_processor_kwargs={"ficoco_method": "magic"})
    assert body["param"] == "ficoco_method"
    assert "'magic'" in body["message"]
    assert "ficoco-v" in body["message"]


def test_unknown_field(client: OpenAI, url: str) -> None:
    body = refused(client, url, mm_processor_kwargs={"ficoco_kep": 64})
    assert body["param"] == "ficoco_kep"
    assert "ficoco_keep" in body["message"]


@pytest.mark.parametrize(
    "broken",
    [
        data_url(b"this is no image"),
        data_url(b""),
        data_url(Image.new("RGB", (64, 64)))[:120],
        "data:image/png;base64,@@@@",
        "file:///etc/hostname",
        "ftp://example.invalid/image.png",
    ],
    ids=["no image", "empty", "cut off", "no base64", "file", "scheme"],
)
def test_broken_image(client: OpenAI, broken: str) -> None:
    assert refused(client, broken)["message"]


def test_huge_image(client: OpenAI) -> None:
    """A few kilobytes that unpack to 400 megapixels."""
    body = refused(client, data_url(Image.new("L", (20000, 20000))))
    assert body["param"] == "image_url"
    assert "400000000 pixels" in body["message"]
    assert "limit of 178956970" in body["message"]


def test_cut_off_png(client: OpenAI, images: list[Image.Image]) -> None:
    whole = base64.b64decode(data_url(images[0]).partition(",")[2])
    assert "image" in refused(client, data_url(whole[: len(whole) // 2]))["message"]


@pytest.mark.parametrize(
    "refusal",
    [
        {"logit_bias": {"99999": 1}},
        {"min_tokens": 99},
        {"vllm_xargs": {"ficoco_keep": 9}},
        {"ficoco": {"keep": 9999}},
    ],
)
def test_the_image_of_a_refused_request_is_answered_next(client: OpenAI, refusal: dict[str, Any]) -> None:
    """VLLM would send the second request without the image, which the first one has not brought to the engine."""
    (image,) = noise([(336, 336)], seed=len(str(refusal)) + 100)
    url = data_url(image)
    refused(client, url, **refusal)
    for _ in range(2):
        answer = client.chat.completions.create(
            model=MODEL, messages=[message("what is this?", [url])], max_tokens=1
        )
        assert answer.usage is not None
