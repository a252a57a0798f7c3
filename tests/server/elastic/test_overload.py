"""A real server whose KV cache is too small for its arrivals: two API server processes, the official client."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from ficoco_vllm.benchmarks.elastic.overload import CEILING, FLOOR, SHORT, arguments, run
from tests.support.server import API_KEY, Server, budget, data_url, message, serve

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.alone, pytest.mark.long]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model in 45 blocks, served by two processes."""
    log = tmp_path_factory.mktemp("elastic") / "log"
    with serve(log, *arguments(SHORT, 2), "--api-key", API_KEY) as server:
        yield server


@pytest.fixture(scope="module")
def result(small: Server) -> dict[str, Any]:
    """The short form of `make bench-elastic`."""
    return asyncio.run(run(small.url, 0, SHORT, API_KEY))


def test_the_fixed_ceiling_queues_without_end(result: dict[str, Any]) -> None:
    fixed = result["fixed"]
    assert fixed["budgets"] == [CEILING], "a budget that a request names always wins"
    assert fixed["late_ttft_seconds"] > 1.5 * fixed["early_ttft_seconds"], result
    assert fixed["longest_queue"] >= 3, result


def test_elastic_keeps_the_time_to_first_token_bounded(result: dict[str, Any]) -> None:
    fixed, elastic = result["fixed"], result["elastic"]
    assert FLOOR in elastic["budgets"], result
    assert set(elastic["budgets"]) <= {FLOOR, 192, CEILING}
    assert elastic["lowest_default"] == FLOOR
    assert elastic["late_ttft_seconds"] < 0.5 * fixed["late_ttft_seconds"], result


def test_it_returns_to_the_ceiling_and_says_so(small: Server, result: dict[str, Any]) -> None:
    assert result["return_seconds"] < 30 + 4 * SHORT.max_release_seconds
    assert small.metric("ficoco:default_budget_tokens") == CEILING
    log = small.log.read_text()
    for keep in (FLOOR, 192, CEILING):
        assert f"requests that name no budget now keep {keep} visual tokens" in log


def test_explanations_are_off_unless_enabled(small: Server) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    for path in ("/ficoco", "/ficoco/", "/ficoco/viewer.js", "/ficoco/options"):
        assert httpx.get(f"{small.url}{path}", headers=headers).status_code == 404
    assert httpx.post(f"{small.url}/ficoco/explain", headers=headers, json={}).status_code == 404


def test_both_processes_give_the_same_budget(small: Server, result: dict[str, Any]) -> None:
    """Each connection may reach another process; in calm both know the ceiling."""
    image = data_url(Image.new("RGB", (64, 64), "red"))

    def six_lengths() -> set[int]:
        lengths = set()
        for _ in range(6):
            with small.client() as client:
                answer = client.chat.completions.create(
                    model="ficoco-demo", messages=[message("what?", [image])], max_tokens=1
                )
                assert answer.usage is not None
                lengths.add(answer.usage.prompt_tokens)
        return lengths

    deadline = time.monotonic() + 60
    while len(lengths := six_lengths()) > 1:  # a process that got no time has not looked at the board yet
        assert time.monotonic() < deadline, lengths
    log = small.log.read_text()
    assert "ApiServer_0" in log
    assert "ApiServer_1" in log
    assert log.count("ficoco-vllm is ready after") == 1
    with small.client() as client:
        explicit: Any = client.chat.completions.create(
            model="ficoco-demo",
            messages=[message("what?", [image])],
            max_tokens=1,
            extra_body=budget(9),
        )
    assert lengths == {explicit.usage.prompt_tokens - 9 + CEILING}
