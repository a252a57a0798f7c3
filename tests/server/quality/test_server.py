"""A real server that holds a target, with the official client."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from tests.support.prometheus import (
    QUALITY_ALERTS,
    QUALITY_ROW,
    Labels,
    filled_in,
    needs_prometheus,
    panels,
    rules,
    scrape,
    without_limit,
)
from tests.support.server import API_KEY, Server, data_url, message, serve
from tests.support.site import Site, loopback_site

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]

ADDRESS = "127.0.0.3"
LADDER = [64, 576]


def arguments(state: Path, method: str = "ficoco-v") -> list[str]:
    """Options of a server that compares as often as it can."""
    quality = {"ladder": LADDER, "share": 1.0, "max_extra": 1.0, "max_tokens_per_minute": 10**9}
    quality |= {"class_header": "x-traffic", "state": str(state)}
    options = ["--ficoco-method", method, "--ficoco-target-agreement", "0.8"]
    options += ["--ficoco-config", json.dumps({"quality": quality}), "--api-key", API_KEY]
    return [*options, "--allowed-media-domains", ADDRESS]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of the counts."""
    return tmp_path_factory.mktemp("quality") / "state.json"


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    """Serves images."""
    with loopback_site(ADDRESS) as served:
        yield served


@pytest.fixture(scope="module")
def server(state: Path) -> Iterator[Server]:
    """The demo model."""
    with serve(state.parent / "log", *arguments(state)) as served:
        yield served


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Questions that 64 tokens are enough for."""
    return embedded(("colour",), 400)


def ask(client: OpenAI, item: Item, url: str | None = None, **more: Any) -> int:
    """Visual tokens that were kept for one question."""
    image = data_url(item.image or b"") if url is None else url
    options = {"temperature": 0, "max_tokens": 8, **more}
    chat = client.chat.completions.create(
        model="ficoco-demo", messages=[message(item.question, [image])], **options
    )
    assert chat.usage is not None
    return int((chat.usage.model_extra or {})["ficoco"]["visual_tokens_kept"])


def ask_until(client: OpenAI, items: list[Item], keep: int) -> int:
    """Ask one question after the other until the default budget is `keep`; the number of requests.

    None is asked twice: with methods of the decoder a chat keeps its budget.
    """
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(items), 8):
            kept = list(pool.map(lambda item: ask(client, item), items[start : start + 8]))
            if kept[-1] == keep:
                return start + len(kept)
    raise AssertionError(f"none of {len(items)} requests kept {keep} tokens")


def wait(server: Server, name: str, value: float) -> None:
    """Wait until a metric has reached a value."""
    deadline = time.monotonic() + 30
    while server.metric(name) < value:
        assert time.monotonic() < deadline, f"{name} is {server.metric(name)}, not {value}"
        time.sleep(0.1)


def at_rest(server: Server) -> float:
    """The number of comparisons, once none is under way."""
    name, before = "ficoco:quality_comparisons_total", -1.0
    while (now := server.metric(name)) != before:
        before = now
        time.sleep(2)
    return now


def test_it_starts_with_all_tokens_and_finds_that_few_are_enough(server: Server, items: list[Item]) -> None:
    with server.client() as client:
        assert ask(client, items[0]) == 576
        assert ask_until(client, items, 64) >= 24
        assert ask(client, items[0], extra_body={"ficoco": {"keep": 100}}) == 100, "a named budget is kept"
        assert ask(client, items[0], extra_body={"ficoco": "off"}) == 576
        other = {"extra_headers": {"x-traffic": "other"}}
        assert ask(client, items[0], **other) == 576, "another class has shown nothing yet"
    assert server.metric("ficoco:quality_comparisons_total") >= 24
    assert server.metric("ficoco:quality_score_total") > 0
    assert server.metric("ficoco:quality_tokens_total") > 24 * 64
    assert server.metric("ficoco:quality_target") == 0.8
    assert server.metric("ficoco:default_budget_tokens") == 64
    assert server.metric("ficoco:quality_skipped_total") == 0
    assert "now keep 64 visual tokens of an image (before: 576)" in server.log.read_text()


def test_the_file_holds_counts_and_nothing_of_a_request(
    server: Server, state: Path, items: list[Item]
) -> None:
    text = state.read_text()
    content = json.loads(text)
    assert set(content) == {"method", "target_agreement", "ladder", "states"}
    assert "" in content["states"]
    assert items[0].question not in text


def test_sampled_and_streamed_answers_are_compared_and_prompts_without_an_image_are_not(
    server: Server, items: list[Item]
) -> None:
    before = at_rest(server)
    with server.client() as client:
        ask(client, items[1], temperature=0.7, seed=1)
        wait(server, "ficoco:quality_comparisons_total", before + 1)
        spent = server.metric("ficoco:quality_tokens_total")
        chunks = client.chat.completions.create(
            model="ficoco-demo",
            messages=[message(items[1].question, [data_url(items[1].image or b"")])],
            temperature=0,
            max_tokens=8,
            stream=True,
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        wait(server, "ficoco:quality_comparisons_total", before + 2)
        spent = server.metric("ficoco:quality_tokens_total") - spent
        assert 576 < spent < 576 + 64, "the given answer is that of its rung, and is not asked for again"
        text_only = client.completions.create(model="ficoco-demo", prompt="What", max_tokens=4)
        assert text_only.usage is not None
        assert text_only.usage.completion_tokens > 0
    assert at_rest(server) == before + 2
    assert server.metric("ficoco:quality_skipped_total") == 0


@needs_prometheus
def test_every_query_of_the_row_and_both_alerts(server: Server, items: list[Item], tmp_path: Path) -> None:
    instance = server.url.removeprefix("http://")
    before = at_rest(server)
    start = time.monotonic()
    with scrape(tmp_path, instance) as prometheus, server.client() as client:
        prometheus.wait_for_scrapes()
        for item in items[:12]:
            ask(client, item)
        wait(server, "ficoco:quality_comparisons_total", before + 6)
        prometheus.wait_for_scrapes()
        window, at = int(time.monotonic() - start) + 2, time.time()

        def query(expression: str) -> dict[Labels, float]:
            return prometheus.query(filled_in(expression, window, "ficoco-demo", instance), at)

        (agreement, target), (low, high), (budget, falls), (tokens, count, tally, skipped) = (
            [query(expression) for expression in expressions] for expressions in panels(QUALITY_ROW).values()
        )
        alerts = {
            rule["alert"]: query(without_limit(rule)) for rule in rules() if rule["alert"] in QUALITY_ALERTS
        }
    assert 0 <= agreement[("keep", "64"),] <= 1
    assert list(target.values()) == [0.8]
    assert 0.8 <= low[()] < high[()] <= 1, (low, high)
    assert budget[("instance", instance),] == 64
    assert list(falls.values()) == [0] * len(falls)
    grown = server.metric("ficoco:quality_comparisons_total") - before
    # Prometheus extrapolates to the edges of the window, which holds few scrapes.
    assert 0.5 < count[()] / (grown / window) < 2
    assert tokens[()] > 576 * count[()]
    assert tally[()] >= grown
    assert skipped == {}
    assert alerts.keys() == QUALITY_ALERTS
    assert all(alerts.values()), alerts


def test_an_image_is_fetched_from_the_network_once(server: Server, site: Site) -> None:
    item = Item("once", "", "what color is the image?", None)
    before = at_rest(server)
    with server.client() as client:
        ask(client, item, site.url("/once"))
    wait(server, "ficoco:quality_comparisons_total", before + 1)
    assert site.paths == ["/once"]


def test_a_new_server_goes_on_from_the_file(server: Server, state: Path, items: list[Item]) -> None:
    with (
        serve(state.parent / "again", *arguments(state), "--api-server-count", "2") as again,
        again.client() as client,
    ):
        assert [ask(client, item) for item in items[:4]] == [64] * 4
        before = again.metric("ficoco:quality_comparisons_total")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda item: ask(client, item), items[:16] * 4))
        # At 64 tokens, one in some fifteen requests of a process pays for a comparison; its first is in advance. One of
        # the two processes has at least 32 of these 64 requests.
        wait(again, "ficoco:quality_comparisons_total", before + 1)


def test_in_the_decoder(tmp_path: Path, items: list[Item]) -> None:
    with (
        serve(tmp_path / "log", *arguments(tmp_path / "state", "ficoco-l")) as decoder,
        decoder.client() as client,
    ):
        assert ask(client, items[0]) == 576
        assert ask_until(client, items, 64) >= 8
        before = at_rest(decoder)
        spent = decoder.metric("ficoco:quality_tokens_total")
        # A question that is new, since a chat keeps its budget.
        ask(client, items[-1], temperature=0.7)
        wait(decoder, "ficoco:quality_comparisons_total", before + 1)
        spent = decoder.metric("ficoco:quality_tokens_total") - spent
        assert 576 < spent < 2 * 576, "the given answer is that of its rung, and is not asked for again"
        assert decoder.metric("ficoco:quality_skipped_total") == 0
