"""A site with images on this machine, which counts what is fetched from it."""

import gzip
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

# What `/large` sends, and what `/bomb` unpacks to.
LARGE_BYTES = 3 * 2**20


@dataclass
class Site:
    """An image at every path but some.

    Attributes:
        host: an address of the loopback, which no client of a model server should reach through it.
        port: of it.
        paths: that were fetched, in order.
    """

    host: str
    port: int = 0
    paths: list[str] = field(default_factory=list)

    def url(self, path: str, host: str | None = None) -> str:
        """Address of a path, by its own host or by what claims to be it."""
        return f"http://{host or self.host}:{self.port}{path}"


@contextmanager
def loopback_site(host: str = "127.0.0.1") -> Iterator[Site]:
    """Serve until the block ends: `/redirect` leads to `/secret`, `/inward` to another address."""
    site, png = Site(host), io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "PNG")
    zeros = bytes(LARGE_BYTES)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.paths.append(self.path)
            status, headers, body = 200, {}, png.getvalue()
            if self.path == "/redirect":
                status, headers, body = 302, {"Location": site.url("/secret")}, b""
            elif self.path == "/inward":
                status, headers, body = 302, {"Location": site.url("/secret", "127.0.0.3")}, b""
            elif self.path == "/missing":
                status, body = 404, b""
            elif self.path == "/large":
                body = zeros
            elif self.path == "/bomb":
                headers, body = {"Content-Encoding": "gzip"}, gzip.compress(zeros)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                self.wfile.write(body)
            except ConnectionError:
                self.close_connection = True  # the client has read enough

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer((host, 0), Handler) as server:
        site.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield site
        server.shutdown()
        thread.join()
