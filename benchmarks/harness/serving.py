"""Subprocesses that run while a block does, above all a server on a free port of this machine."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
# Below the ports that Linux gives to outgoing connections: a server binds its port seconds after the probe.
_PORTS = range(20_000, 32_768)
OURS = ("-m", "ficoco_vllm.server.cli", "serve")
# vLLM's own server; its command `vllm` does not start in the CPU build.
STOCK = ("-m", "vllm.entrypoints.openai.api_server")
START_SECONDS = 600.0
STOP_SECONDS = 60.0
Process = subprocess.Popen[bytes]


class StartError(RuntimeError):
    """A process ended or was not ready in time. The message ends with its log."""


@dataclass(frozen=True)
class Served:
    """A running server."""

    port: int
    process: Process

    @property
    def url(self) -> str:
        """Base URL, without a path."""
        return f"http://{HOST}:{self.port}"


@contextmanager
def serving(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str | None] | None = None,
    program: Sequence[str] = OURS,
    python: Path = Path(sys.executable),
    folder: Path | None = None,
) -> Iterator[Served]:
    """Run a server on a free port until the block ends.

    `python`, whose packages serve, runs `program`, `ficoco-vllm serve` or vLLM's own server, with `arguments`, host and
    port. Variables of `environment` are added to those of this process, or removed by None.

    Raises:
        StartError: the server ends or does not answer in time.
    """
    port = free_port()
    command = [str(python), *program, *arguments, "--host", HOST, "--port", str(port)]
    with running(command, log, lambda: is_healthy(f"http://{HOST}:{port}"), environment, folder) as process:
        yield Served(port, process)


@contextmanager
def running(
    command: Sequence[str],
    log: Path,
    is_ready: Callable[[], bool],
    environment: Mapping[str, str | None] | None = None,
    folder: Path | None = None,
) -> Iterator[Process]:
    """Run a command until the block ends; see `serving` for the arguments.

    Raises:
        StartError: it ends or is not ready in time.
    """
    variables = {**os.environ, **(environment or {})}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in variables.items() if value is not None},
            cwd=folder,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_bytes()[-5000:].decode(errors="replace")
                raise StartError(f"the process did not start: {' '.join(command)}\n{tail}")
            time.sleep(0.3)
        yield process
    finally:
        _stop(process)


def free_port() -> int:
    """Find a port that nothing listens on and that Linux gives to no outgoing connection.

    Raises:
        OSError: there is none.
    """
    # The system's generator: vLLM seeds Python's global one identically in several processes.
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise OSError(f"no port of {HOST} from {_PORTS.start} to {_PORTS.stop - 1} is free")


def is_healthy(url: str) -> bool:
    """Whether /health of the server at a URL without a path answers 200."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _stop(process: Process) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the process and its children share this group with nobody
        process.wait()
