"""A real server in a process of its own, started through the command line."""

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image

START_SECONDS = 600
# Budget of the server that the tests share; that of `make serve`.
DEMO_KEEP = 64
# Also what the README's client sends.
API_KEY = "none"
# What conftest.py sets for engines inside the test process.
_ONLY_IN_PROCESS = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_CPU_KVCACHE_SPACE")


@dataclass
class Server:
    """Where it listens, and what it has printed."""

    port: int
    log: Path
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """Without a path."""
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> OpenAI:
        """The official client."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=120)

    def metric(self, name: str) -> float:
        """Sum of one Prometheus metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((f"{name}{{", f"{name} "))
        )

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextmanager
def serve(log: Path, *arguments: str) -> Iterator[Server]:
    """Run `ficoco-vllm serve` until the block ends; only this process and its children are stopped."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in _ONLY_IN_PROCESS}
    command = [sys.executable, "-m", "ficoco_vllm.server.cli", "serve", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(port, log, process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not server.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text()[-5000:]}")
            time.sleep(0.5)
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def data_url(image: Image.Image | bytes) -> str:
    """An image, or any bytes that claim to be one, as a data URL."""
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(image).decode()


def message(text: str, urls: Sequence[str] = ()) -> dict[str, Any]:
    """One message of a user, images first."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def budget(keep: int | None) -> dict[str, Any]:
    """`extra_body` of a request with a budget of its own."""
    return {} if keep is None else {"mm_processor_kwargs": {"ficoco_keep": keep}}
