"""A server of our own for as long as a benchmark needs it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

HOST = "127.0.0.1"
OURS = ("-m", "ficoco_vllm.server.cli", "serve")
# vLLM's own server; its command `vllm` does not start in the CPU build.
STOCK = ("-m", "vllm.entrypoints.openai.api_server")
START_SECONDS = 600.0
STOP_SECONDS = 60.0


@contextmanager
def serve(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = OURS,
) -> Iterator[str]:
    """Run a server on a free port until the block ends.

    Args:
        arguments: of the program, without host and port.
        log: file that takes what the server prints.
        environment: variables beside those of this process.
        program: words behind `python` that serve; `ficoco-vllm serve`, or vLLM's own server.

    Yields:
        The server's address, without a path.

    Raises:
        RuntimeError: the server ends or does not answer in time; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, *program, *arguments]
    command += ["--host", HOST, "--port", str(port)]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    url = f"http://{HOST}:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start: {' '.join(command)}\n{_tail(log)}")
            time.sleep(0.5)
        yield url
    finally:
        _stop(process)


def is_healthy(url: str) -> bool:
    """Whether /health of a server answers 200.

    Args:
        url: without a path.
    """
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the group of this server alone
        process.wait()


def _tail(log: Path, num_bytes: int = 5000) -> str:
    return log.read_bytes()[-num_bytes:].decode(errors="replace")
