"""Tests of the media loader without an engine; `test_safety.py` tests it over HTTP."""

import asyncio
import base64
import io
import random
import socket
import warnings
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.exceptions import (
    GracefulHTTPError,
    VLLMClientError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)

from ficoco_vllm.environment import ALLOW_PRIVATE_MEDIA, MAX_IMAGE_BYTES, MAX_PIXELS
from ficoco_vllm.server.media.connector import FicocoMediaConnector
from ficoco_vllm.server.media.fetching import GuardedConnection, is_public
from tests.support.site import LARGE_BYTES, Site, loopback_site

pytestmark = pytest.mark.compat


@pytest.fixture
def site() -> Iterator[Site]:
    """Counts fetches."""
    with loopback_site() as result:
        yield result


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def png(side: int, mode: str = "L") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def picture(form: str, mode: str = "RGB", sides: tuple[int, int] = (9, 7)) -> bytes:
    """A file of one picture."""
    return saved(Image.radial_gradient("L").resize(sides).convert(mode), form)


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def fetch(connector: FicocoMediaConnector, url: str, waits: bool, kind: str = "image") -> Any:
    """Fetch by the asynchronous method, which the server calls, or by the synchronous one."""
    if not waits:
        return getattr(connector, f"fetch_{kind}")(url)

    async def ask() -> Any:
        try:
            return await getattr(connector, f"fetch_{kind}_async")(url)
        finally:
            await connector.connection.close()

    return asyncio.run(ask())


both_doors = pytest.mark.parametrize("waits", [True, False], ids=["async", "sync"])


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@both_doors
def test_nothing_is_fetched_where_no_domain_is_allowed(site: Site, kind: str, waits: bool) -> None:
    with pytest.raises(VLLMValidationError, match="not fetched from the network"):
        fetch(FicocoMediaConnector(), site.url("/a"), waits, kind)
    assert site.paths == []


@both_doors
def test_only_allowed_domains_are_fetched_from(site: Site, waits: bool) -> None:
    """Neither a user's name nor a backslash passes one host off as another."""
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    assert fetch(connector, site.url("/a"), waits).size == (8, 8)
    assert site.paths == ["/a"]
    for url in (
        site.url("/b", "localhost"),
        site.url("/b", "127.0.0.1@localhost"),
        f"http://localhost:{site.port}\\@127.0.0.1/b",
        f"http://2130706433:{site.port}/b",
    ):
        with pytest.raises(VLLMValidationError, match="one of the allowed domains"):
            fetch(connector, url, waits)
    assert site.paths == ["/a"]


@both_doors
def test_a_name_that_leads_into_the_private_network(
    site: Site, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """The name is allowed, but its address is not, unless the operator allows it."""
    connector = FicocoMediaConnector(allowed_media_domains=["localhost"])
    with pytest.raises(VLLMValidationError, match=r"not on the public internet; .*--ficoco-allow-private"):
        fetch(connector, site.url("/a", "localhost"), waits)
    assert site.paths == []
    monkeypatch.setenv(ALLOW_PRIVATE_MEDIA, "1")
    connector = FicocoMediaConnector(allowed_media_domains=["localhost"])
    assert fetch(connector, site.url("/a", "localhost"), waits).size == (8, 8)


def test_a_redirect_does_not_lead_there_either(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """With redirects enabled; the operator has named the first address."""
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "1")
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    with pytest.raises(VLLMValidationError, match="not on the public internet"):
        fetch(connector, site.url("/inward"), True)
    assert site.paths == ["/inward"]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::", False),
        ("64:ff9b::10.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public
    info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 80))
    if public:
        GuardedConnection(allow_private=False)._open(info).close()
    else:
        with pytest.raises(VLLMValidationError):
            GuardedConnection(allow_private=False)._open(info)
        GuardedConnection(allow_private=False, allowed=[ip_address(address)])._open(info).close()


@both_doors
@pytest.mark.parametrize(("allowed", "paths"), [("0", ["/redirect"]), ("1", ["/redirect", "/secret"])])
def test_redirects(
    site: Site, monkeypatch: pytest.MonkeyPatch, allowed: str, paths: list[str], waits: bool
) -> None:
    """Not followed with the environment that `ficoco-vllm serve` sets; vLLM's default follows them."""
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", allowed)
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    if allowed == "1":
        assert fetch(connector, site.url("/redirect"), waits).size == (8, 8)
    else:
        with pytest.raises(VLLMValidationError, match=r"answers with a redirect .* are not followed"):
            fetch(connector, site.url("/redirect"), waits)
    assert site.paths == paths


@both_doors
@pytest.mark.parametrize("path", ["/large", "/bomb"])
def test_an_image_of_too_many_bytes(
    site: Site, monkeypatch: pytest.MonkeyPatch, path: str, waits: bool
) -> None:
    """Also a body that the site compresses: the unpacked size counts."""
    monkeypatch.setenv(MAX_IMAGE_BYTES, str(LARGE_BYTES // 2))
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    for url in (site.url(path), data_url(bytes(LARGE_BYTES))):
        with pytest.raises(GracefulHTTPError, match=f"up to {LARGE_BYTES // 2} bytes") as caught:
            fetch(connector, url, waits)
        assert caught.value.http_status == 413
    exactly = data_url(bytes(LARGE_BYTES // 2))
    with pytest.raises(VLLMValidationError, match="the data are not an image"):
        fetch(connector, exactly, waits)


@both_doors
def test_a_host_that_does_not_answer(site: Site, monkeypatch: pytest.MonkeyPatch, waits: bool) -> None:
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1", "none.invalid"])
    for url in ("http://127.0.0.1:9/a", "http://none.invalid/a", site.url("/missing")):
        with pytest.raises(VLLMUnprocessableEntityError, match=r"fetched from|HTTP 404"):
            fetch(connector, url, waits)


def test_a_proxy_decides_where_there_is_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy may be private: the operator has named it."""
    monkeypatch.setenv("http_proxy", site.url(""))
    monkeypatch.delenv("no_proxy", raising=False)
    connector = FicocoMediaConnector(allowed_media_domains=["none.invalid"])
    assert fetch(connector, "http://none.invalid/a", True).size == (8, 8)
    assert site.paths == ["http://none.invalid/a"]


def test_the_operator_s_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv(MAX_PIXELS, "10000")
    with warnings.catch_warnings():
        connector = FicocoMediaConnector()
        assert connector.fetch_image(data_url(png(100))).size == (100, 100)
        with pytest.raises(VLLMValidationError, match="10201 pixels"):
            connector.fetch_image(data_url(png(101)))


UNREADABLE = {
    "no image": (data_url(b"this is no image"), "the data are not an image; allowed: PNG, JPEG"),
    "nothing": (data_url(b""), "the data are not an image"),
    "text as an image": ("data:text/plain;base64,aGVsbG8=", "the data are not an image"),
    "a vector image": (data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "the data are not an image"),
    "cut off": (data_url(png(64, "RGB")[:60]), "Failed to load image|the data are not an image"),
    "no base64": ("data:image/png;base64,@@@@", "not valid base64"),
    "cut off base64": ("data:image/png;base64,iVBORw0KG", "not valid base64"),
    "not in base64": ("data:image/png,abc", "Only base64 data URLs"),
    "no comma": ("data:image/png;base64", "missing ',' separator"),
    "no data": ("data:", "missing ',' separator"),
    "another scheme": ("ftp://example.invalid/a.png", "must be either a HTTP, data or file URL"),
    "no URL": ("image.png", "must be either a HTTP, data or file URL"),
    "a broken address": ("http://[::1", "not fetched from the network"),
    "a file": ("file:///etc/hostname", "allowed-local-media-path"),
}


@both_doors
@pytest.mark.parametrize(("url", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_named(url: str, words: str, waits: bool) -> None:
    with pytest.raises(VLLMValidationError, match=f"^image_url: .*({words})") as caught:
        fetch(FicocoMediaConnector(), url, waits)
    assert caught.value.parameter == "image_url"
    assert "<" not in str(caught.value), "the text is for people"


@both_doors
def test_files_that_cannot_be_read(tmp_path: Path, waits: bool) -> None:
    folder = tmp_path / "media"
    (folder / "inner").mkdir(parents=True)
    (folder / "text.png").write_text("hello")
    connector = FicocoMediaConnector(allowed_local_media_path=str(folder))
    for name, words in (
        ("missing.png", "the file does not exist"),
        ("inner", "the URL names a folder"),
        ("text.png/more.png", "the file cannot be read"),
        ("text.png", "the data are not an image"),
        (f"{'a' * 300}.png", "the file cannot be read"),
        ("..", "must be a subpath"),
        ("%00.png", "image_url: "),
    ):
        with pytest.raises(VLLMValidationError, match=words) as caught:
            fetch(connector, f"file://{folder}/{name}", waits)
        assert caught.value.parameter == "image_url"


@both_doors
@pytest.mark.parametrize("sides", [(1, 201), (201, 1), (2, 10_000), (1, 100_000)])
def test_thin_lines_are_refused(sides: tuple[int, int], waits: bool) -> None:
    """The processor would scale the shorter side up to hundreds of pixels, and the longer one by as much."""
    with pytest.raises(VLLMValidationError, match=rf"{sides[0]} x {sides[1]} pixels .* up to 200 times"):
        fetch(FicocoMediaConnector(), data_url(picture("PNG", sides=sides)), waits)


@both_doors
def test_unusual_images_are_read(waits: bool) -> None:
    """Modes, bit depths, frames, and a type in the URL that is not the data's."""
    frames = [Image.new("P", (9, 7), color) for color in (1, 2, 3)]
    deep = Image.fromarray(np.full((7, 9), 40_000, dtype=np.uint16))
    for content in (
        picture("JPEG", "CMYK"),
        picture("JPEG", "L"),
        picture("PNG", "1"),
        picture("PNG", "LA"),
        picture("PNG", "P"),
        picture("PNG", "RGBA"),
        picture("TIFF", "F"),
        picture("TIFF", "I"),
        saved(deep, "PNG"),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(frames[0].convert("RGB"), "WEBP", save_all=True, append_images=frames[1:]),
        picture("PNG", sides=(1, 1)),
    ):
        image = fetch(FicocoMediaConnector(), data_url(content), waits)
        assert image.size in ((9, 7), (1, 1))
        assert image.mode == "RGB"


@both_doors
@pytest.mark.parametrize("content", [b"", b"no tensor", b"\x93NUMPY", b"PK\x03\x04"])
def test_embeddings_that_cannot_be_read(content: bytes, waits: bool) -> None:
    data = base64.b64encode(content).decode() or "@"
    with pytest.raises(VLLMValidationError, match="image_embeds: the data cannot be read") as caught:
        fetch(FicocoMediaConnector(), data, waits, "image_embedding")
    assert caught.value.parameter == "image_embeds"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "AVIF", "DDS", "TIFF", "ICO", "BMP"])
def test_broken_files_are_the_client_s_error(form: str) -> None:
    """Bytes changed at random, seeded: no exception of Pillow's readers leads to HTTP 500."""
    generator, buffer = random.Random(form), io.BytesIO()
    Image.radial_gradient("L").resize((48, 64)).convert("RGB").save(buffer, form)
    connector, num_broken = FicocoMediaConnector(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about broken files
        for _ in range(150):
            content = bytearray(buffer.getvalue())
            for _ in range(generator.randint(1, 6)):
                place = generator.randrange(min(120, len(content)))
                if generator.random() < 0.7:
                    content[place] = generator.choice((0, 255, 127, generator.randrange(256)))
                else:
                    del content[place : place + generator.randint(1, 20)]
            try:
                connector.fetch_image(data_url(bytes(content)))
            except VLLMClientError:
                num_broken += 1
    assert num_broken > 10
