"""A server for one picture: on this machine only, behind a key of its own, gone afterwards."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 900
STOP_SECONDS = 30
DEFAULT_METHOD = "ficoco-v"


@contextmanager
def own_server(model: str | None, method: str | None, keep: int | None) -> Iterator[tuple[str, str]]:
    """Run `ficoco-vllm serve` until the block ends.

    Args:
        model: what it serves; None means the demo model.
        method: of the reduction.
        keep: its budget; None leaves it to the method.

    Yields:
        Its address and its API key.

    Raises:
        RuntimeError: it does not start; with what it said last.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ficoco_vllm.server.cli", "serve", *([model] if model else [])]
    command += ["--host", "127.0.0.1", "--port", str(port), "--ficoco-explain"]
    command += ["--ficoco-method", method or DEFAULT_METHOD]
    command += ["--ficoco-keep", str(keep)] if keep is not None else []
    key = secrets.token_urlsafe(16)  # in the environment, where other users of the machine cannot read it
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="ficoco-explain-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_API_KEY": key}
            )
        try:
            _wait(process, url, log)
            yield url, key
        finally:
            _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in reversed(said) if line.startswith("ficoco-vllm: error: ")), None)
    if error is not None:
        raise RuntimeError(error.removeprefix("ficoco-vllm: error: "))
    raise RuntimeError("the server did not start:\n" + "\n".join(said[-20:]))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
