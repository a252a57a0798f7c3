"""The shutdown gate of a stopping server, without a model."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from ficoco_vllm.server.lifecycle.shutdown import FLUSH_SECONDS, RETRY_SECONDS, Shutdown, ShutdownGate

pytestmark = pytest.mark.compat


# Task of a request, in a loop that takes no calls.
OPEN = Mock()


class Engine:
    """vLLM's client, as far as it is used."""

    def __init__(self, dead: bool = False) -> None:
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=dead))
        self.timeouts: list[float | None] = []

    @property
    def errored(self) -> bool:
        return self.engine_core.resources.engine_dead

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        self.engine_core.resources.engine_dead = True


def application(shutdown: Shutdown) -> FastAPI:
    """One route that answers slowly, in pieces."""
    app = FastAPI()

    @app.post("/slow")
    async def slow() -> StreamingResponse:
        async def pieces() -> Any:
            for _ in range(3):
                await asyncio.sleep(0.1)
                yield b"piece "

        return StreamingResponse(pieces())

    @app.get("/metrics")
    async def metrics() -> str:
        return "1"

    @app.post("/waiting")
    async def waiting() -> str:
        await asyncio.Event().wait()  # for an engine that is gone
        return "never"

    @app.post("/failing")
    async def failing() -> JSONResponse:
        await asyncio.sleep(0.2)
        return JSONResponse({"error": "cannot schedule new futures after shutdown"}, 500)

    @app.post("/raising")
    async def raising() -> JSONResponse:
        await asyncio.sleep(0.2)
        raise RuntimeError("cannot schedule new futures after shutdown")

    @app.post("/begun")
    async def begun() -> StreamingResponse:
        async def pieces() -> Any:
            yield b"piece "
            await asyncio.Event().wait()

        return StreamingResponse(pieces())

    app.add_middleware(ShutdownGate, shutdown=shutdown)
    return app


def test_what_is_open_is_answered_and_what_comes_is_turned_away() -> None:
    shutdown, engine = Shutdown(), Engine()
    shutdown.attach(engine)

    async def run() -> None:
        transport = httpx.ASGITransport(application(shutdown))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            opened = [asyncio.create_task(client.post("/slow")) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert len(shutdown.open_tasks) == 3
            stopping = asyncio.get_running_loop().run_in_executor(None, lambda: engine.shutdown(timeout=20))
            await asyncio.sleep(0.05)
            assert not engine.timeouts
            late = await client.post("/slow")
            assert late.status_code == 503
            assert late.json()["error"]["code"] == 503
            assert late.headers["retry-after"] == str(RETRY_SECONDS)
            assert (await client.get("/health")).status_code == 503
            assert (await client.get("/metrics")).status_code == 200
            assert [(await task).text for task in opened] == ["piece " * 3] * 3
            await stopping

    asyncio.run(run())
    assert len(engine.timeouts) == 1
    assert 15 < engine.timeouts[0] < 20


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_requests_that_nothing_will_answer_get_503_after_the_timeout(timeout: float) -> None:
    """The engine has stopped, and they had not reached it; uvicorn waits for them without a limit."""
    shutdown, engine = Shutdown(), Engine()
    shutdown.attach(engine)

    async def run() -> None:
        transport = httpx.ASGITransport(application(shutdown))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            opened = [asyncio.create_task(client.post("/waiting")) for _ in range(3)]
            begun = asyncio.create_task(client.post("/begun"))
            await asyncio.sleep(0.05)
            await asyncio.get_running_loop().run_in_executor(None, lambda: engine.shutdown(timeout=timeout))
            for answer in await asyncio.wait_for(asyncio.gather(*opened), FLUSH_SECONDS + 2):
                assert answer.status_code == 503
                assert answer.json()["error"]["code"] == 503
                assert answer.headers["retry-after"] == str(RETRY_SECONDS)
            with pytest.raises(AssertionError):  # httpx's, about a response without an end
                await asyncio.wait_for(begun, 2)
            assert not shutdown.open_tasks

    asyncio.run(run())
    assert engine.timeouts == [0]


@pytest.mark.parametrize(
    ("stops", "dead", "status"), [(True, False, 503), (True, True, 500), (False, False, 500)]
)
@pytest.mark.parametrize("path", ["/failing", "/raising"])
def test_errors_about_an_engine_that_was_stopped_are_503(
    stops: bool, dead: bool, status: int, path: str
) -> None:
    """Whether a handler of vLLM's answers the error, or nothing does."""
    shutdown, engine = Shutdown(), Engine(dead)
    shutdown.attach(engine)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(application(shutdown), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            opened = asyncio.create_task(client.post(path))
            await asyncio.sleep(0.05)
            if stops:
                await asyncio.get_running_loop().run_in_executor(None, engine.shutdown)
            return await opened

    answer = asyncio.run(run())
    assert answer.status_code == status
    assert ("retry-after" in answer.headers) is (status == 503)


def test_other_cancellations_stay_cancellations() -> None:
    shutdown = Shutdown()

    async def run() -> None:
        transport = httpx.ASGITransport(application(shutdown))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            opened = asyncio.create_task(client.post("/waiting"))
            await asyncio.sleep(0.05)
            opened.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opened

    asyncio.run(run())
    assert not shutdown.open_tasks


def test_it_waits_no_longer_than_it_may() -> None:
    shutdown, engine = Shutdown(), Engine()
    shutdown.attach(engine)
    shutdown.open_tasks.add(OPEN)
    start = time.monotonic()
    engine.shutdown(timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 5
    assert engine.timeouts == [0.0]


@pytest.mark.parametrize(("timeout", "dead"), [(0, False), (None, False), (20, True)])
def test_it_does_not_wait(timeout: float | None, dead: bool) -> None:
    """Without a timeout, as by vLLM's default, or with a dead engine."""
    shutdown, engine = Shutdown(), Engine(dead)
    shutdown.attach(engine)
    shutdown.open_tasks.add(OPEN)
    engine.shutdown(timeout=timeout)
    assert engine.timeouts == [timeout]
    assert shutdown.draining


def test_it_never_waits_in_the_thread_that_answers() -> None:
    shutdown, engine = Shutdown(), Engine()
    shutdown.attach(engine)
    shutdown.open_tasks.add(OPEN)

    async def run() -> None:
        engine.shutdown(timeout=20)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join(10)
    assert engine.timeouts == [20]


@pytest.mark.parametrize("dead", [True, False])
def test_whether_the_engine_died_before_its_shutdown(dead: bool) -> None:
    shutdown, engine = Shutdown(), Engine(dead)
    shutdown.attach(engine)
    assert not shutdown.engine_died
    engine.shutdown()
    engine.shutdown()  # vLLM does it twice
    assert shutdown.engine_died is dead
