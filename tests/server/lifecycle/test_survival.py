"""A killed engine and a stop signal under load, with a supervisor like systemd's or compose's."""

import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from ficoco_vllm.benchmarks.harness.http import chat, data_url
from ficoco_vllm.benchmarks.soak.server.client import ANSWERED, LOST, SERVER_ERROR, Client, Outcome
from ficoco_vllm.benchmarks.soak.server.mixture import Request
from ficoco_vllm.benchmarks.soak.server.run import read_gauges
from ficoco_vllm.server.lifecycle.cleanup import SHARED_MEMORY
from tests.support.pictures import noise
from tests.support.server import Server, serve

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]

# Starts its arguments again unless they end with 0, like `Restart=on-failure`; hands SIGTERM on.
SUPERVISOR = """
trap 'kill -TERM $child' TERM
while :; do
  "$@" & child=$!
  wait $child; status=$?
  while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
  echo "ended with $status"
  [ $status -eq 0 ] && exit 0
done
"""
SERVE = ("-c", SUPERVISOR, "supervisor", sys.executable, "-m", "ficoco_vllm.server.cli", "serve")
# Between the kill and the last client's error: vLLM notices within a second and looks every five.
ERROR_SECONDS = 30.0
END_SECONDS = 60.0
# Beyond the shutdown's timeout, for the engine's end and for the answers to those that it has not reached.
ANSWER_SECONDS = 20.0
# Beyond the shutdown's timeout, until the last process has ended.
STOP_SECONDS = 30.0
NUM_REQUESTS = 16
# So long that they seldom end before all of them run, and on a slow machine within the shutdown's timeout.
NUM_TOKENS, SHUTDOWN_SECONDS = 2000, 300


@dataclass(frozen=True)
class Supervised:
    """A server that is started again.

    Attributes:
        server: its first process is the supervisor.
        folder: of its temporary files alone.
    """

    server: Server
    folder: Path

    def processes(self) -> list[psutil.Process]:
        """Processes of the server, without the supervisor."""
        return psutil.Process(self.server.process.pid).children(recursive=True)


@pytest.fixture(scope="module", params=["ficoco-v", "ficoco-l"])
def supervised(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Supervised]:
    """The demo model, with time for running requests when it stops."""
    folder = tmp_path_factory.mktemp("supervised")
    arguments = ["--ficoco-method", request.param, "--ficoco-keep", "64", "--shutdown-timeout"]
    arguments += [str(SHUTDOWN_SECONDS)]
    with (
        tempfile.TemporaryDirectory() as temporary,  # a short path: sockets lie in it
        serve(
            folder / "log", *arguments, program=SERVE, python=Path("/bin/bash"), TMPDIR=temporary
        ) as server,
    ):
        yield Supervised(server, Path(temporary))


def long_asks() -> list[Request]:
    """Requests that take a while, every second one as a stream."""
    body = {
        "model": "ficoco-demo",
        "messages": [{"role": "user", "content": "is there a red sign?"}],
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
    }
    streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
    return [
        Request(
            "text", json.dumps(streamed if stream else body).encode(), stream=stream, num_tokens=NUM_TOKENS
        )
        for stream in (True, False) * (NUM_REQUESTS // 2)
    ]


async def under_load(server: Server, strike: psutil.Process, signal: int) -> tuple[list[Outcome], float]:
    """Send requests, and a signal to a process once all of them run.

    Returns:
        How the requests ended, and seconds from the signal to the last of them.
    """
    async with Client(server.url) as client:
        for _ in range(5):
            sending = [asyncio.create_task(client.ask(ask)) for ask in long_asks()]
            running = 0.0
            while running < NUM_REQUESTS and not any(task.done() for task in sending):
                await asyncio.sleep(0.05)
                running = read_gauges(await client.metrics())["vllm:num_requests_running"]
            if not any(task.done() for task in sending):
                break
            # They were over before this process, on a busy machine, could ask how many run.
            done = await asyncio.gather(*sending)
            assert {outcome.kind for outcome in done} == {ANSWERED}, done
        else:
            pytest.fail("no moment in which all requests ran")
        strike.send_signal(signal)
        start = time.monotonic()
        return list(await asyncio.gather(*sending)), time.monotonic() - start


def shared_memory_of(processes: list[psutil.Process]) -> set[Path]:
    """Files of the shared memory that they have mapped."""
    return {
        Path(matches.path)
        for process in processes
        for matches in process.memory_maps()
        if matches.path.startswith(f"{SHARED_MEMORY}/") and Path(matches.path).exists()
    }


def wait_until_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=END_SECONDS)
    assert not alive


def test_a_killed_engine_is_an_error_and_a_new_server(supervised: Supervised) -> None:
    server = supervised.server
    processes = supervised.processes()
    (engine,) = (process for process in processes if "EngineCore" in process.name())
    segments = shared_memory_of(processes)
    assert segments
    time.sleep(6)  # processes are scanned every five seconds, and only scanned ones are cleaned up
    outcomes, seconds = asyncio.run(under_load(server, engine, 9))
    kinds = {outcome.kind for outcome in outcomes}
    assert kinds <= {SERVER_ERROR, LOST}, outcomes
    assert SERVER_ERROR in kinds, outcomes
    for outcome in outcomes:
        assert "EngineCore encountered an issue" in outcome.why or "Error" in outcome.why, outcome
    assert seconds < ERROR_SECONDS
    wait_until_ended(processes)
    assert not any(segment.exists() for segment in segments)
    deadline = time.monotonic() + 300
    while not server.is_healthy():
        assert time.monotonic() < deadline, server.log.read_text()[-3000:]
        time.sleep(0.5)
    assert server.log.read_text(errors="replace").count("ended with 1") == 1
    ours = [path for path in supervised.folder.iterdir() if path.name.startswith(("ficoco-", "vllm"))]
    assert len(ours) == 1, ours

    async def ask() -> Outcome:
        async with Client(server.url) as client:
            return await client.ask(long_asks()[0])

    assert asyncio.run(ask()).kind == ANSWERED


def test_a_stopping_server_answers_accepted_requests(supervised: Supervised) -> None:
    """The timeout is vLLM's `--shutdown-timeout`, which is used up then."""
    server = supervised.server
    processes = supervised.processes()
    segments = shared_memory_of(processes)
    supervisor = psutil.Process(server.process.pid)
    outcomes, _ = asyncio.run(under_load(server, supervisor, 15))
    assert [outcome.kind for outcome in outcomes] == [ANSWERED] * NUM_REQUESTS, outcomes
    assert server.process.wait(END_SECONDS) == 0, server.log.read_text()[-3000:]
    wait_until_ended(processes)
    assert not any(segment.exists() for segment in segments)
    assert list(supervised.folder.iterdir()) == []
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", server.port))


@pytest.mark.parametrize("timeout", [0, 3])
def test_a_stopping_server_does_not_wait_for_requests_before_the_engine(tmp_path: Path, timeout: int) -> None:
    """Many images wait for the one thread that processes them; clients would wait for ten minutes."""
    arguments = ["--ficoco-method", "ficoco-v", "--ficoco-keep", "64", "--shutdown-timeout", str(timeout)]
    with serve(tmp_path / "log", *arguments) as server:
        bodies = [
            chat("ficoco-demo", "what is this?", [data_url(image)], max_tokens=4)
            for image in noise([(1000, 1000)] * 60, seed=5)
        ]

        async def run() -> tuple[list[int], float, float]:
            async with httpx.AsyncClient(base_url=server.url, timeout=600) as client:
                sending = [
                    asyncio.create_task(client.post("/v1/chat/completions", json=body)) for body in bodies
                ]
                while sum(task.done() for task in sending) < 2:
                    await asyncio.sleep(0.05)
                psutil.Process(server.process.pid).send_signal(15)
                start = time.monotonic()
                answers = await asyncio.gather(*sending)
                return [answer.status_code for answer in answers], start, time.monotonic() - start

        statuses, start, seconds = asyncio.run(run())
        assert set(statuses) <= {200, 503}
        assert timeout or 503 in statuses
        assert seconds < timeout + ANSWER_SECONDS
        assert server.process.wait(END_SECONDS) == 0
        assert time.monotonic() - start < timeout + STOP_SECONDS
