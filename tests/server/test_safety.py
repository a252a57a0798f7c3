"""Limits of the media that a client can make the server read, through HTTP: sources, sizes, and API keys."""

import base64
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import BODY_BYTES, IMAGE_BYTES, PIXELS, SITE, Bounded
from tests.support.server import API_KEY, data_url, message

pytestmark = pytest.mark.server


def ask(bounded: Bounded, *urls: str) -> httpx.Response:
    """A chat about images."""
    body = {"model": "small", "messages": [message("what is this?", urls)], "max_tokens": 1}
    return post(bounded, "/v1/chat/completions", json=body)


def post(bounded: Bounded, path: str, **more: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {API_KEY}", **more.pop("headers", {})}
    return httpx.post(f"{bounded.server.url}{path}", headers=headers, timeout=120, **more)


def refused(answer: httpx.Response, status: int) -> str:
    """The message of an error in OpenAI's form."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == status
    return str(error["message"])


@pytest.fixture(autouse=True)
def lives_on(bounded: Bounded) -> Iterator[None]:
    """After every refusal the server still answers, and has fetched nothing."""
    bounded.site.paths.clear()
    yield
    assert bounded.server.is_healthy()


def test_an_image_from_an_allowed_domain(bounded: Bounded) -> None:
    answer = ask(bounded, bounded.site.url("/a"))
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["ficoco"]["visual_tokens"] == 144
    assert bounded.site.paths == ["/a"]


def test_no_other_domain(bounded: Bounded) -> None:
    for url in ("http://example.invalid/a", bounded.site.url("/a", f"{SITE}@example.invalid")):
        assert "from one of the allowed domains" in refused(ask(bounded, url), 400)
    assert bounded.site.paths == []


def test_an_allowed_name_with_a_private_address(bounded: Bounded) -> None:
    message = refused(ask(bounded, bounded.site.url("/a", "localhost")), 400)
    assert "not on the public internet" in message
    assert "--ficoco-allow-private-media" in message
    assert bounded.site.paths == []


def test_no_redirect(bounded: Bounded) -> None:
    message = refused(ask(bounded, bounded.site.url("/redirect")), 400)
    assert "answers with a redirect (HTTP 302), and redirects are not followed" in message
    assert bounded.site.paths == ["/redirect"]


def test_what_is_not_there(bounded: Bounded) -> None:
    assert "HTTP 404" in refused(ask(bounded, bounded.site.url("/missing")), 422)


@pytest.mark.parametrize("path", ["/large", "/bomb"])
def test_an_image_of_too_many_bytes_from_a_site(bounded: Bounded, path: str) -> None:
    """`/bomb` is a few kilobytes on the wire."""
    assert f"up to {IMAGE_BYTES} bytes" in refused(ask(bounded, bounded.site.url(path)), 413)


def test_an_image_of_too_many_bytes_in_the_body(bounded: Bounded) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (640, 640, 3), dtype=np.uint8)
    url = data_url(Image.fromarray(noise))
    assert IMAGE_BYTES < len(base64.b64decode(url.partition(",")[2])) < 2 * IMAGE_BYTES
    assert f"up to {IMAGE_BYTES} bytes (--ficoco-max-image-mb)" in refused(ask(bounded, url), 413)


def test_an_image_of_too_many_pixels(bounded: Bounded) -> None:
    """A few kilobytes each; the second one is over the limit."""
    assert ask(bounded, data_url(Image.new("L", (1000, PIXELS // 1000)))).status_code == 200
    answer = ask(bounded, data_url(Image.new("L", (1000, PIXELS // 1000 + 1))))
    assert f"limit of {PIXELS} pixels" in refused(answer, 400)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_a_bomb_in_the_text_of_an_image(bounded: Bounded, kind: bytes) -> None:
    """64 MiB of zeros beside 4 pixels, packed to 64 KiB."""
    packed = zlib.compress(bytes(64 * 2**20), 9)
    text = b"k\0\0" + packed if kind == b"zTXt" else b"k\0\1\0\0\0" + packed
    header = struct.pack(">IIBBBBB", 2, 2, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\0\0" * 2)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(kind, text)
    png += chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert len(png) < 2**17
    assert "too large" in refused(ask(bounded, data_url(png)), 400)


def test_an_image_of_more_pixels_than_its_file_has(bounded: Bounded) -> None:
    """The header claims 30000 x 30000 pixels, for which nothing may allocate memory."""
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )
    assert "900000000 pixels" in refused(ask(bounded, data_url(png)), 400)


def test_too_many_images(bounded: Bounded) -> None:
    url = data_url(Image.new("RGB", (32, 32)))
    assert ask(bounded, url, url).status_code == 200
    assert "At most 2 image(s)" in refused(ask(bounded, url, url, url), 400)


def test_files_of_the_folder_alone(bounded: Bounded) -> None:
    folder = bounded.folder
    assert ask(bounded, f"file://{folder}/image.png").status_code == 200
    for path in (
        f"{folder}/../secret.png",
        f"{folder}/%2e%2e/secret.png",
        f"{folder.parent}/secret.png",
        f"{folder}/link.png",
        "/etc/passwd",
    ):
        assert "must be a subpath" in refused(ask(bounded, f"file://{path}"), 400)


ROUTES = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/tokenize",
    "/ficoco/explain",
)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "in chunks"])
def test_a_body_of_too_many_bytes(bounded: Bounded, path: str, declared: bool) -> None:
    body = b'{"model": "small", "prompt": "' + b"a" * BODY_BYTES + b'"}'
    content = body if declared else (body[start : start + 2**16] for start in range(0, len(body), 2**16))
    answer = post(bounded, path, content=content, headers={"Content-Type": "application/json"})
    assert f"up to {BODY_BYTES} bytes (--ficoco-max-body-mb)" in refused(answer, 413)


def test_a_body_that_fits(bounded: Bounded) -> None:
    """Read, and refused for its content."""
    body = b'{"model": "other", "prompt": "' + b"a" * (BODY_BYTES - 100) + b'"}'
    answer = post(bounded, "/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert "other" in refused(answer, 404)


def test_explanations_are_for_those_with_the_key_and_not_too_many(bounded: Bounded) -> None:
    body = {"image": "nonsense", "question": "what?"}
    for key in ("", "Bearer wrong"):
        headers = {"Authorization": key}
        assert post(bounded, "/ficoco/explain", json=body, headers=headers).status_code == 401
        assert httpx.get(f"{bounded.server.url}/ficoco/options", headers=headers).status_code == 401
    answers = [post(bounded, "/ficoco/explain", json=body) for _ in range(6)]
    statuses = [answer.status_code for answer in answers]
    assert statuses == sorted(statuses)
    assert set(statuses) == {400, 429}
    assert int(answers[-1].headers["retry-after"]) <= 61
    assert "at most 3 explanations a minute" in refused(answers[-1], 429)
