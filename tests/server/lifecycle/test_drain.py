"""The gate of a server that is told to stop, without a model."""

import asyncio
import threading
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from ficoco_vllm.server.lifecycle.death import has_died, watch_engine
from ficoco_vllm.server.lifecycle.drain import RETRY_SECONDS, Drain, DrainGate

pytestmark = pytest.mark.compat


class Engine:
    """vLLM's client, as far as it is touched."""

    def __init__(self, dead: bool = False) -> None:
        self.engine_core = SimpleNamespace(resources=SimpleNamespace(engine_dead=dead))
        self.timeouts: list[float | None] = []

    @property
    def errored(self) -> bool:
        return self.engine_core.resources.engine_dead

    def shutdown(self, timeout: float | None = None) -> None:
        self.timeouts.append(timeout)
        self.engine_core.resources.engine_dead = True


def application(drain: Drain) -> FastAPI:
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

    app.add_middleware(DrainGate, drain=drain)
    return app


def test_what_is_open_is_answered_and_what_comes_is_turned_away() -> None:
    drain, engine = Drain(), Engine()
    drain.before_shutdown(engine)

    async def run() -> None:
        transport = httpx.ASGITransport(application(drain))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            opened = [asyncio.create_task(client.post("/slow")) for _ in range(3)]
            await asyncio.sleep(0.05)
            assert drain.num_open == 3
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


def test_it_waits_no_longer_than_it_may() -> None:
    drain, engine = Drain(), Engine()
    drain.before_shutdown(engine)
    drain.num_open = 1
    start = time.monotonic()
    engine.shutdown(timeout=0.2)
    assert 0.2 <= time.monotonic() - start < 5
    assert engine.timeouts == [0.0]


@pytest.mark.parametrize(("timeout", "dead"), [(0, False), (None, False), (20, True)])
def test_it_does_not_wait(timeout: float | None, dead: bool) -> None:
    """Without a time for it, as vLLM's default; or where nobody would answer."""
    drain, engine = Drain(), Engine(dead)
    drain.before_shutdown(engine)
    drain.num_open = 1
    engine.shutdown(timeout=timeout)
    assert engine.timeouts == [timeout]
    assert drain.draining


def test_it_never_waits_in_the_thread_that_answers() -> None:
    drain, engine = Drain(), Engine()
    drain.before_shutdown(engine)
    drain.num_open = 1

    async def run() -> None:
        engine.shutdown(timeout=20)

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    thread.join(10)
    assert engine.timeouts == [20]


@pytest.mark.parametrize("dead", [True, False])
def test_a_dead_engine_is_told_from_one_that_was_shut_down(dead: bool) -> None:
    engine, args = Engine(dead), SimpleNamespace()
    assert not has_died(args)
    watch_engine(engine, args)
    assert not has_died(args)
    engine.shutdown()
    engine.shutdown()  # vLLM does it twice
    assert has_died(args) == dead
