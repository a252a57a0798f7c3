"""vLLM's router (PyPI: vllm-router) before several servers."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ficoco_vllm.benchmarks.harness.serving import free_port
from tests.support.server import Server

START_SECONDS = 60


@contextmanager
def route(log: Path, servers: Sequence[Server]) -> Iterator[Server]:
    """Send requests to the servers in turn until the block ends. Nothing is retried: a lost request would show."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "vllm_router.launch_router",
        "--policy",
        "round_robin",
        "--disable-retries",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-host", "127.0.0.1"]
    command += ["--prometheus-port", str(free_port()), "--worker-urls", *(server.url for server in servers)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ)
    router = Server(port, log, process)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not router.is_healthy():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the router did not start:\n{log.read_text()[-5000:]}")
            time.sleep(0.2)
        yield router
    finally:
        process.terminate()
        process.wait(30)
