"""SIGINT and SIGTERM to a server that starts, or is ready: all of it ends, with one line and without a traceback."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from ficoco_vllm.benchmarks.harness.serving import HOST, OURS, START_SECONDS, free_port
from tests.support.server import ONLY_IN_PROCESS, serve

# Far from any machine's time: a signal that is lost leaves a server that runs until it is killed.
END_SECONDS = 120
# A line of uvicorn's about a request.
REQUEST = re.compile(r'INFO: +\S+:\d+ - "(GET|POST) /')
# In the command of a process that Python starts, until it takes a name of its own.
_SPAWNED = "multiprocessing.spawn"


@pytest.fixture(autouse=True)
def default_of_sigint() -> Iterator[None]:
    """A shell lets its jobs in the background ignore SIGINT, and what the tests start would inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def children_of(server: int, parent: str) -> list[psutil.Process]:
    """Processes of a server, once a child of the process of this name is in the midst of its imports."""
    children = psutil.Process(server).children(recursive=True)
    with suppress(psutil.Error):
        if any(
            _SPAWNED in " ".join(child.cmdline())
            and parent in " ".join(child.parent().cmdline())
            and any("libtorch" in file.path for file in child.memory_maps())
            for child in children
        ):
            return children
    return []


@pytest.mark.compat
@pytest.mark.server
@pytest.mark.parametrize("parent", ["serve", pytest.param("EngineCore", marks=pytest.mark.long)])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_starting_server_stops(tmp_path: Path, number: signal.Signals, parent: str) -> None:
    """While the engine imports vLLM, and while its worker does.

    A terminal sends SIGINT to all processes, a supervisor sends SIGTERM to the first one.
    """
    log = tmp_path / "log"
    command = [sys.executable, *OURS, "--host", HOST, "--port", str(free_port())]
    # A short path: sockets lie in it.
    with tempfile.TemporaryDirectory() as temporary, log.open("wb") as output:
        environment = {name: value for name, value in os.environ.items() if name not in ONLY_IN_PROCESS}
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**environment, "TMPDIR": temporary},
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (children := children_of(server.pid, parent)):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            if number == signal.SIGINT:
                os.killpg(server.pid, number)
            else:
                server.send_signal(number)
            status = server.wait(END_SECONDS)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
        _, alive = psutil.wait_procs(children, timeout=END_SECONDS)
        left = [path.name for path in Path(temporary).iterdir() if path.name.startswith(("ficoco-", "vllm"))]
    *progress, last = log.read_text().splitlines()
    assert (status, last) == (130, "ficoco-vllm: stopped"), log.read_text()
    assert all(line.startswith("ficoco-vllm: ") and " s  " in line for line in progress), progress
    assert (alive, left) == ([], [])


@pytest.mark.compat
@pytest.mark.server
@pytest.mark.parametrize("method", ["ficoco-v", pytest.param("ficoco-l", marks=pytest.mark.long)])
def test_a_ready_server_ends_with_one_line(tmp_path: Path, method: str) -> None:
    """A terminal sends SIGINT to all processes: no process reports what its exit has left to the system."""
    log = tmp_path / "log"
    with serve(log, "--ficoco-method", method, "--ficoco-keep", "64", verbose=False) as server:
        deadline = time.monotonic() + START_SECONDS
        while "  try  " not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        body = {"model": "ficoco-demo", "prompt": "is it a circle?"}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=END_SECONDS).status_code == 200
        processes = psutil.Process(server.process.pid).children(recursive=True)
        os.killpg(server.process.pid, signal.SIGINT)
        status = server.process.wait(END_SECONDS)
        _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    _, _, after = log.read_text().partition("  try  ")
    _, *lines = after.splitlines()
    strange = [line for line in lines if line and not REQUEST.match(line)]
    assert (status, strange, alive) == (0, ["ficoco-vllm: stopped"], [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_blocks_is_interrupted(number: signal.Signals) -> None:
    """The handler of asyncio would wait for the end of the task, which is the engine's start."""
    code = f"""
import asyncio, os, time
from ficoco_vllm.server.lifecycle.interrupts import stop_at_once

async def block():
    os.kill(os.getpid(), {number.value})
    for _ in range(100):
        time.sleep(0.01)
    print("finished")

stop_at_once()
try:
    asyncio.run(block())
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "interrupted\n"


def test_what_is_ignored_stays_ignored() -> None:
    """As by `nohup`, and by a shell for jobs in the background."""
    code = """
import os, signal
from ficoco_vllm.server.lifecycle.interrupts import stop_at_once
signal.signal(signal.SIGINT, signal.SIG_IGN)
stop_at_once()
os.kill(os.getpid(), signal.SIGINT)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
