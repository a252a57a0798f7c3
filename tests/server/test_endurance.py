"""The server soak in miniature, and its detection of planted faults."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ficoco_vllm.benchmarks.soak.server.__main__ import bars
from ficoco_vllm.benchmarks.soak.server.client import Client
from ficoco_vllm.benchmarks.soak.server.mixture import CHAT, Target, make_requests
from ficoco_vllm.benchmarks.soak.server.run import GAUGES, read_counts, run, tree_mib
from tests.server.conftest import BODY_BYTES, KEEP, NUM_PATCHES, Bounded
from tests.support.server import API_KEY, DEMO_ARGUMENTS, Server, serve

TOWER = Target(
    model="ficoco-demo",
    methods=("ficoco-v", "tome", "evit", "topk-cls"),
    budgets=(288, 64, 48),
    num_patches=576,
    max_images=None,
    max_body_bytes=None,
    max_model_len=4096,
)
DECODER = Target(
    model="small",
    methods=("ficoco-l", "fastv"),
    budgets=(100, KEEP, 4),
    num_patches=NUM_PATCHES,
    max_images=2,
    max_body_bytes=BODY_BYTES,
    max_model_len=1024,
    allows_off=False,
)
NUM_TOWER, NUM_DECODER = 150, 120


def failures(record: dict[str, Any]) -> set[str]:
    """Names of the bars that fail."""
    return {bar.name.removeprefix("soak-x-") for bar in bars(record, "x") if not bar.passed}


def endured(
    server: Server, target: Target, count: int, transport: httpx.AsyncBaseTransport | None = None
) -> dict[str, Any]:
    """A short run of two rounds, the second a burst."""

    async def send() -> dict[str, Any]:
        async with Client(server.url, API_KEY, transport) as client:
            requests = make_requests(target, 0, count)
            return await run(
                client, server.process.pid, requests, count, count // 2, num_open=12, burst_every=2
            )

    return asyncio.run(send())


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with few requests at the same time, so that the burst queues on every machine."""
    log = tmp_path_factory.mktemp("crowded") / "log"
    with serve(log, *DEMO_ARGUMENTS, "--max-num-seqs", "8") as server:
        yield server


@pytest.mark.long
@pytest.mark.server
def test_the_tower_in_miniature(crowded: Server) -> None:
    record = endured(crowded, TOWER, NUM_TOWER)
    assert failures(record) == set(), json.dumps({**record, "rounds": None})


@pytest.mark.server
def test_the_decoder_in_miniature(bounded: Bounded) -> None:
    record = endured(bounded.server, DECODER, NUM_DECODER)
    assert failures(record) == set(), json.dumps({**record, "rounds": None})


class Tampering(httpx.AsyncHTTPTransport):
    """Transport that changes the answer of one chat."""

    def __init__(self, tamper: Callable[[bytes], tuple[int, bytes]]) -> None:
        super().__init__()
        self.tamper, self.num_left = tamper, 5

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if request.url.path != CHAT or response.status_code != 200:
            return response
        self.num_left -= 1
        if self.num_left != 0:
            return response
        body = await response.aread()
        await response.aclose()
        status, body = self.tamper(body)
        return httpx.Response(status, content=body)


def broken_off(body: bytes) -> tuple[int, bytes]:
    raise httpx.ReadError("the connection is gone")


def another_s(body: bytes) -> tuple[int, bytes]:
    start = body.index(b'"id":"') + 6
    return 200, body.replace(body[start : body.index(b'"', start)], b"chatcmpl-another")


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize(
    ("tamper", "failing"),
    [
        (broken_off, {"lost", "ended"}),
        (lambda body: (200, body + body), {"twice", "ended"}),
        (lambda body: (500, b'{"error": {"code": 500}}'), {"server-error", "ended"}),
        (another_s, {"wrong", "ended"}),
    ],
    ids=["lost", "twice", "500", "another's"],
)
def test_a_planted_fault_is_noticed(
    server: Server, tamper: Callable[[bytes], tuple[int, bytes]], failing: set[str]
) -> None:
    """The server has also counted one answer more than arrived."""
    asks = [ask for ask in make_requests(TOWER, 0, 60) if ask.name == "text" and not ask.abort][:6]

    async def send() -> dict[str, Any]:
        async with Client(server.url, API_KEY, Tampering(tamper)) as client:
            return await run(client, server.process.pid, asks, 8, num_open=4)

    result = failures(asyncio.run(send()))
    counted = {"vllm-counts-answers-and-aborts", "ficoco-counts-answers-and-aborts"}
    absent = {"aborts-early", "aborts-mid", "answers-compared", "longest-queue-of-a-burst"}
    assert result - absent == failing | counted


def made_up(mib_per_round: float = 0.0, **more: Any) -> dict[str, Any]:
    """A run of 40 rounds whose memory grows."""
    rounds = [
        {
            "num_requests": 240 * (i + 1),
            "gauges": dict.fromkeys(GAUGES, 0.0),
            "mib": 2000 + i % 3 + i * mib_per_round,
        }
        for i in range(40)
    ]
    counts = {"stop": 100.0, "length": 8000.0, "abort": 300.0}
    return {
        "num_requests": 9600,
        "outcomes": {"answered": 8050, "refused": 1150, "aborted": 400},
        "aborts": {"early": 300, "mid": 100},
        "refusals": 200,
        "counted": {
            "vllm:request_success_total": counts,
            "ficoco:requests_total": counts | {"refused": 200.0},
            "http_requests_total": {"2xx": 8400.0, "4xx": 1150.0},
        },
        "longest_queue": 9.0,
        "num_compared": 10,
        "different": [],
        "rounds": rounds,
    } | more


def held(gauge: str) -> dict[str, Any]:
    """A run that ends with something held."""
    record = made_up()
    record["rounds"][-1]["gauges"][gauge] = 1.0
    return record


def counted(name: str, label: str, value: float) -> dict[str, Any]:
    """A run whose server counts something else."""
    record = made_up()
    record["counted"] = {key: dict(values) for key, values in record["counted"].items()}
    record["counted"][name][label] = value
    return record


@pytest.mark.parametrize(
    ("record", "failing"),
    [
        (made_up(0.5), set()),
        (made_up(3.0), {"growth-mib-per-1000-requests"}),
        (held("vllm:kv_cache_usage_perc"), {"kv-cache-usage-perc"}),
        (held("ficoco:kv_blocks_held"), {"kv-blocks-held"}),
        (held("vllm:num_requests_running"), {"num-requests-running"}),
        (made_up(outcomes={"answered": 8049, "refused": 1150, "aborted": 400}), {"ended"}),
        (counted("vllm:request_success_total", "length", 7900.0), {"vllm-counts-answers"}),
        (counted("ficoco:requests_total", "length", 8100.0), {"ficoco-counts-answers-and-aborts"}),
        (counted("vllm:request_success_total", "error", 1.0), {"vllm-counts-others"}),
        (counted("ficoco:requests_total", "refused", 199.0), {"ficoco-refusals-miscounted"}),
        (counted("http_requests_total", "5xx", 1.0), {"responses-5xx"}),
        (made_up(different=["one"]), {"answers-unlike-alone"}),
    ],
)
def test_bars(record: dict[str, Any], failing: set[str]) -> None:
    assert failures(record) == failing


def test_memory_of_a_tree_of_processes() -> None:
    """A child of a child that takes 64 MiB is seen."""
    grandchild = "import sys; input(); kept = bytearray(b'1') * 2**26; print('taken', flush=True); input()"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        before = tree_mib(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "taken\n"
        after = tree_mib(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(30)
    assert 60 < after - before < 90


@pytest.mark.long
@pytest.mark.server
def test_scrapers_that_go_away(server: Server) -> None:
    """Prometheus dies in the middle of its scrapes: requests are answered, the next scrape is whole."""
    ask = next(ask for ask in make_requests(TOWER, 0, 60) if ask.name == "text" and not ask.abort)

    async def scrape_and_go() -> None:
        for _ in range(10):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            await writer.drain()
            writer.transport.abort()

    async def both() -> list[str]:
        async with Client(server.url, API_KEY) as client:
            sending = [client.ask(ask) for _ in range(4)]
            outcomes = await asyncio.gather(scrape_and_go(), *sending)
            assert read_counts(await client.metrics())["vllm:request_success_total"]
            return [outcome.kind for outcome in outcomes[1:]]

    assert asyncio.run(both()) == ["answered"] * 4
