"""What the loader of media fetches, counted by a server on this machine; no engine."""

import asyncio
import base64
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from PIL import Image
from vllm.exceptions import VLLMValidationError

from ficoco_vllm.plugin import MAX_PIXELS
from ficoco_vllm.server.media import FicocoMediaConnector


@dataclass
class Site:
    """An image at every path but one, which leads to another."""

    address: str = ""
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def site() -> Iterator[Site]:
    """Listens on the loopback, which no client of a model server should reach through it."""
    site, png = Site(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.paths.append(self.path)
            redirects = self.path == "/redirect"
            self.send_response(302 if redirects else 200)
            if redirects:
                self.send_header("Location", f"{site.address}/secret")
            self.send_header("Content-Length", str(0 if redirects else len(png.getvalue())))
            self.end_headers()
            self.wfile.write(b"" if redirects else png.getvalue())

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        site.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("waits", [True, False], ids=["async", "sync"])
def test_nothing_is_fetched_where_no_domain_is_allowed(site: Site, kind: str, waits: bool) -> None:
    connector = FicocoMediaConnector()

    def fetch() -> Any:
        if waits:
            return asyncio.run(getattr(connector, f"fetch_{kind}_async")(f"{site.address}/a"))
        return getattr(connector, f"fetch_{kind}")(f"{site.address}/a")

    with pytest.raises(VLLMValidationError, match="not fetched from the network"):
        fetch()
    assert site.paths == []


def test_only_allowed_domains_are_fetched_from(site: Site) -> None:
    """Neither a user's name nor a backslash passes one host off as another."""
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    assert connector.fetch_image(f"{site.address}/a").size == (8, 8)
    assert site.paths == ["/a"]
    port = site.address.rpartition(":")[2]
    for url in (
        f"http://localhost:{port}/b",
        f"http://127.0.0.1@localhost:{port}/b",
        f"http://localhost:{port}\\@127.0.0.1/b",
    ):
        with pytest.raises(ValueError, match="one of the allowed domains"):
            connector.fetch_image(url)
    assert site.paths == ["/a"]


@pytest.mark.parametrize(("allowed", "paths"), [("0", ["/redirect"]), ("1", ["/redirect", "/secret"])])
def test_redirects(site: Site, monkeypatch: pytest.MonkeyPatch, allowed: str, paths: list[str]) -> None:
    """Not followed with the environment that `ficoco-vllm serve` sets; vLLM's default follows them."""
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", allowed)
    connector = FicocoMediaConnector(allowed_media_domains=["127.0.0.1"])
    if allowed == "1":
        assert connector.fetch_image(f"{site.address}/redirect").size == (8, 8)
    else:
        with pytest.raises(ValueError, match="cannot identify image"):
            connector.fetch_image(f"{site.address}/redirect")
    assert site.paths == paths


def test_the_operator_s_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    def url(side: int) -> str:
        png = io.BytesIO()
        Image.new("L", (side, side)).save(png, "PNG")
        return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setenv(MAX_PIXELS, "10000")
    with warnings.catch_warnings():
        connector = FicocoMediaConnector()
        assert connector.fetch_image(url(100)).size == (100, 100)
        with pytest.raises(VLLMValidationError, match="10201 pixels"):
            connector.fetch_image(url(101))
