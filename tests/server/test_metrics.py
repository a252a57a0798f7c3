"""`/metrics` after known traffic: the counters, promtool's opinion, and every query of the dashboard."""

import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
from openai import OpenAI
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import estimate, model_shape, unreduced
from ficoco_vllm.server.commands.plan import read_config
from tests.support.prometheus import (
    QUALITY_ALERTS,
    QUALITY_ROW,
    Prometheus,
    filled_in,
    needs_prometheus,
    panels,
    promtool,
    rules,
    scrape,
    without_limit,
)
from tests.support.server import DEMO_KEEP, VALUE_BYTES, Server, budget, data_url, message

MODEL = "ficoco-demo"
NUM_PATCHES = 576
NUM_REDUCED, NUM_OFF, NUM_TEXT, NUM_REFUSED, NUM_STREAMS = 8, 4, 3, 4, 3

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.alone]

Labels = tuple[tuple[str, str], ...]


def instance(server: Server) -> str:
    """The label that Prometheus gives to the server."""
    return server.url.removeprefix("http://")


def scraped(server: Server) -> dict[tuple[str, Labels], float]:
    """Our samples: name and labels, sorted, without those that are the same in all."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    result = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("ficoco:"):
                assert sample.labels.pop("model_name") == MODEL
                engine = sample.labels.pop("engine")
                assert engine == ("" if sample.labels.get("outcome") == "refused" else "0")
                result[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return result


def chat(client: OpenAI, image: Image.Image | None, keep: int | None = None, **more: Any) -> Any:
    urls = [] if image is None else [data_url(image)]
    arguments = {"max_tokens": 4, "temperature": 0, "extra_body": budget(keep), **more}
    return client.chat.completions.create(
        model=MODEL, messages=[message("is there a red sign?", urls)], **arguments
    )


@dataclass
class Traffic:
    """The sent requests and their expected metrics."""

    before: dict[tuple[str, Labels], float]
    after: dict[tuple[str, Labels], float] = field(default_factory=dict)
    during: dict[tuple[str, Labels], float] = field(default_factory=dict)
    prompt_tokens: list[int] = field(default_factory=list)
    slowest_seconds: float = 0.0
    window_seconds: int = 0
    during_queries: dict[str, dict[Labels, float]] = field(default_factory=dict)
    queries: dict[tuple[str, int], dict[Labels, float]] = field(default_factory=dict)
    unfiltered: list[tuple[str, int]] = field(default_factory=list)
    alerts: dict[str, dict[Labels, float]] = field(default_factory=dict)

    def grown(self, name: str, **labels: str) -> float:
        key = (name, tuple(sorted(labels.items())))
        return self.after[key] - self.before.get(key, 0.0)


def send(server: Server, images: list[Image.Image], traffic: Traffic, prometheus: Prometheus | None) -> None:
    """Requests of every kind; running streams are measured, then left by their client."""
    with server.client() as client, ExitStack() as streams:
        kinds = [DEMO_KEEP] * NUM_REDUCED + [NUM_PATCHES] * NUM_OFF + [None] * NUM_TEXT
        for index, kind in enumerate(kinds):
            start = time.monotonic()
            # An image that no cache knows, so that the tower runs.
            answer = chat(client, Image.new("RGB", (64, 64), (index, 50, 90)) if kind else None, kind)
            traffic.slowest_seconds = max(traffic.slowest_seconds, time.monotonic() - start)
            if kind == DEMO_KEEP:
                traffic.prompt_tokens.append(answer.usage.prompt_tokens)
        for _ in range(NUM_REFUSED):
            with pytest.raises(openai.BadRequestError):
                chat(client, images[4], NUM_PATCHES + 1)

        def start_stream(_: int) -> float:
            """Its seconds to the second token."""
            more = {"max_tokens": 3500, "stream": True, "extra_body": {"ignore_eos": True}}
            start = time.monotonic()
            running = streams.enter_context(chat(client, images[4], **more))
            next(iter(running))
            next(iter(running))
            return time.monotonic() - start

        # Together, or on a slow machine the first would end before the last begins.
        with ThreadPoolExecutor(NUM_STREAMS) as pool:
            traffic.slowest_seconds = max(
                traffic.slowest_seconds, *pool.map(start_stream, range(NUM_STREAMS))
            )
        traffic.during = scraped(server)
        if prometheus is not None:
            prometheus.wait_for_scrapes()
        at = time.time()
    # Queried at that time, but after the streams: on a fast machine they would end before their client leaves.
    if prometheus is not None:
        titles = ("KV cache in use", "KV blocks", "Running and waiting", "Requests running", "KV cache use")
        for title in titles:
            for index, expression in enumerate(panels()[title]):
                traffic.during_queries[f"{title} {index}"] = prometheus.query(
                    filled_in(expression, 60, MODEL, instance(server)), at
                )


@pytest.fixture(scope="module")
def traffic(
    server: Server, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Traffic]:
    """Known traffic, before which and after which `/metrics` was read; Prometheus scrapes it where there is one."""
    with server.client() as client:
        for _ in range(3):  # a rate is cut where its counter was zero, or missing, shortly before the window
            chat(client, images[4], DEMO_KEEP)
        with pytest.raises(openai.BadRequestError):
            chat(client, images[4], NUM_PATCHES + 1)
    time.sleep(1)
    with ExitStack() as stack:
        prometheus = None
        if needs_prometheus.args[0]:
            folder = tmp_path_factory.mktemp("prometheus")
            prometheus = stack.enter_context(scrape(folder, instance(server)))
            prometheus.wait_for_scrapes()
        start = time.monotonic()
        result = Traffic(scraped(server))
        send(server, images, result, prometheus)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:  # a client that goes away is noticed a little later
            result.after = scraped(server)
            if result.grown("ficoco:requests_total", method="ficoco-v", outcome="abort") >= NUM_STREAMS:
                break
            time.sleep(0.3)
        if prometheus is not None:
            # Prometheus extrapolates by up to a scrape at both ends of the window, so the window must be long.
            time.sleep(max(0.0, start + 20 - time.monotonic()))
            prometheus.wait_for_scrapes()
            result.window_seconds = int(time.monotonic() - start) + 2
            at = time.time()  # of all queries, which together take longer than the window's margin
            for title, expressions in panels().items():
                for index, expression in enumerate(expressions):
                    selected, *others = [
                        prometheus.query(filled_in(expression, result.window_seconds, *names), at)
                        for names in ((MODEL, instance(server)), ("other", ".*"), (".*", "other:8000"))
                    ]
                    result.queries[title, index] = selected
                    result.unfiltered += [(title, index) for values in others if values]
            for rule in rules():
                expression = without_limit(rule)
                for ours, here in (('job="ficoco-vllm"', 'job="server"'), ('"5xx"', '"4xx"')):
                    expression = expression.replace(ours, here)
                result.alerts[rule["alert"]] = prometheus.query(expression)
        yield result


def test_tokens_and_kv(traffic: Traffic) -> None:
    reduced = NUM_REDUCED + NUM_STREAMS
    missing = reduced * (NUM_PATCHES - DEMO_KEEP)
    assert traffic.grown("ficoco:visual_tokens_in_total", method="ficoco-v") == reduced * NUM_PATCHES
    assert traffic.grown("ficoco:visual_tokens_kept_total", method="ficoco-v") == reduced * DEMO_KEEP
    assert traffic.grown("ficoco:visual_tokens_in_total", method="off") == NUM_OFF * NUM_PATCHES
    assert traffic.grown("ficoco:visual_tokens_kept_total", method="off") == NUM_OFF * NUM_PATCHES
    assert traffic.grown("ficoco:visual_tokens_in_total", method="text") == 0
    assert traffic.grown("ficoco:kv_tokens_avoided_total", method="ficoco-v", segment="0") == missing
    token_bytes = kv_token_bytes()
    assert traffic.grown("ficoco:kv_bytes_avoided_total", method="ficoco-v", segment="0") == (
        missing * token_bytes
    )


def kv_token_bytes() -> int:
    """Keys and values of one token in all layers of the demo model."""
    text = read_config("demo")["text_config"]
    return int(2 * text["num_hidden_layers"] * text["num_key_value_heads"] * text["head_dim"] * VALUE_BYTES)


def test_flops_are_the_planner_s(traffic: Traffic) -> None:
    shape = model_shape(read_config("demo"))
    plan = ServerPlan.for_model(FicocoConfig(method="ficoco-v", keep=DEMO_KEEP), shape).image_tokens()
    assert len(set(traffic.prompt_tokens)) == 1
    num_text_tokens = traffic.prompt_tokens[0] - DEMO_KEEP
    costs = [estimate(shape, tokens, num_text_tokens=num_text_tokens) for tokens in (unreduced(shape), plan)]
    avoided = costs[0].total_flops - costs[1].total_flops
    assert avoided > 1e9
    grown = traffic.grown("ficoco:prefill_flops_avoided_total", method="ficoco-v")
    assert grown == (NUM_REDUCED + NUM_STREAMS) * avoided


def test_requests_by_method_and_outcome(traffic: Traffic) -> None:
    def ended(method: str, *outcomes: str) -> float:
        return sum(
            traffic.grown("ficoco:requests_total", method=method, outcome=outcome) for outcome in outcomes
        )

    assert ended("ficoco-v", "stop", "length") == NUM_REDUCED
    assert ended("ficoco-v", "abort") == NUM_STREAMS
    assert ended("ficoco-v", "refused") == NUM_REFUSED
    assert ended("off", "stop", "length") == NUM_OFF
    assert ended("text", "stop", "length") == NUM_TEXT


def test_histograms(traffic: Traffic) -> None:
    reduced = NUM_REDUCED + NUM_STREAMS
    assert traffic.grown("ficoco:budget_tokens_count", method="ficoco-v") == reduced
    assert traffic.grown("ficoco:budget_tokens_sum", method="ficoco-v") == reduced * DEMO_KEEP
    assert traffic.grown("ficoco:budget_tokens_bucket", method="ficoco-v", le="48.0") == 0
    assert traffic.grown("ficoco:budget_tokens_bucket", method="ficoco-v", le="64.0") == reduced
    for method, count in (("ficoco-v", reduced), ("off", NUM_OFF), ("text", NUM_TEXT)):
        assert traffic.grown("ficoco:time_to_first_token_seconds_count", method=method) == count
        seconds = traffic.grown("ficoco:time_to_first_token_seconds_sum", method=method)
        assert 0 < seconds < count * traffic.slowest_seconds
    assert traffic.grown("ficoco:inter_token_latency_seconds_count", method="ficoco-v") >= NUM_STREAMS


def test_the_worker_s_time_arrives(traffic: Traffic) -> None:
    """It is measured in another process than the one that answers, and only where an image is reduced."""
    labels = {"method": "ficoco-v", "site": "tower"}
    count = traffic.grown("ficoco:reduction_seconds_count", **labels)
    assert NUM_REDUCED <= count <= NUM_REDUCED + NUM_STREAMS  # the streams share an image
    assert 0 < traffic.grown("ficoco:reduction_seconds_sum", **labels) < NUM_REDUCED * traffic.slowest_seconds


def test_blocks_while_requests_run(traffic: Traffic) -> None:
    labels = (("method", "ficoco-v"), ("segment", "0"))
    block_size = 128  # of vLLM's CPU build
    saved = traffic.during["ficoco:kv_blocks_saved", labels]
    assert saved == NUM_STREAMS * (NUM_PATCHES - DEMO_KEEP) / block_size
    assert traffic.during["ficoco:kv_blocks_held", labels] >= NUM_STREAMS
    assert traffic.after["ficoco:kv_blocks_saved", labels] == 0


def test_default_budget(traffic: Traffic) -> None:
    assert traffic.after["ficoco:default_budget_tokens", (("method", "ficoco-v"),)] == DEMO_KEEP


@needs_prometheus
def test_promtool_check_metrics(server: Server, traffic: Traffic) -> None:
    """Its one finding is the colon, which vLLM's names have too."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines(keepends=True)
    ours = [line for line in lines if "ficoco:" in line]
    assert len(ours) > 100
    findings = promtool("check", "metrics", text="".join(ours))
    unexpected = [
        line
        for line in (findings.stdout + findings.stderr).splitlines()
        if line and not line.endswith("metric names should not contain ':'")
    ]
    assert unexpected == []
    broken = "".join(ours).replace("ficoco:requests_total", "ficoco:requests")  # promtool does look
    assert 'should have "_total" suffix' in promtool("check", "metrics", text=broken).stderr


def by(values: dict[Labels, float], *names: str) -> dict[Any, float]:
    """Values by some of the labels."""
    return {
        tuple(dict(labels)[name] for name in names) if len(names) > 1 else dict(labels)[names[0]]: value
        for labels, value in values.items()
    }


@needs_prometheus
def test_every_query_of_the_dashboard(traffic: Traffic) -> None:
    """Each is evaluated by a real Prometheus over the known traffic, and each has an expected value here.

    Those of a target agreement are in `quality/test_server.py`.

    Rates are right within 15%: Prometheus extrapolates from the scrapes within the window to its ends.
    """
    seconds = traffic.window_seconds
    reduced, num_images = NUM_REDUCED + NUM_STREAMS, NUM_REDUCED + NUM_STREAMS + NUM_OFF
    missing = reduced * (NUM_PATCHES - DEMO_KEEP)
    left = dict(traffic.queries)

    def query(title: str, index: int = 0) -> dict[Labels, float]:
        values = left.pop((title, index))
        assert values, f"{title} {index} returns nothing"
        return values

    def a_second(count: float) -> Any:
        return pytest.approx(count / seconds, rel=0.15)

    assert query("Requests running")[()] == 0
    assert query("Requests waiting")[()] == 0
    assert query("KV cache use")[()] == 0
    assert 0 < query("First token, 95th percentile")[()] <= 2 * traffic.slowest_seconds
    saved = query("Visual tokens saved")[()]
    assert saved == pytest.approx(missing / (num_images * NUM_PATCHES), rel=0.15)
    assert query("Error rate")[()] == 0
    num_chats = num_images + NUM_TEXT + NUM_REFUSED
    statuses = by(query("Error rate by status"), "status")
    assert statuses == {"4xx": pytest.approx(NUM_REFUSED / num_chats, rel=0.15)}

    removed = by(query("Visual tokens removed"), "method")
    assert removed["ficoco-v"] == pytest.approx(1 - DEMO_KEEP / NUM_PATCHES, rel=1e-3)
    assert removed["off"] == pytest.approx(0, abs=1e-3)
    assert query("Visual tokens")[()] == a_second((reduced + NUM_OFF) * NUM_PATCHES)
    assert query("Visual tokens", 1)[()] == a_second(reduced * DEMO_KEEP + NUM_OFF * NUM_PATCHES)
    flops = traffic.grown("ficoco:prefill_flops_avoided_total", method="ficoco-v")
    assert by(query("Prefill FLOPs avoided"), "method")["ficoco-v"] == a_second(flops)
    assert by(query("KV cache not written"), "segment")["0"] == a_second(missing * kv_token_bytes())
    assert by(query("KV tokens not written"), "segment")["0"] == a_second(missing)
    requests = by(query("Requests"), "method", "outcome")
    assert requests["ficoco-v", "abort"] == a_second(NUM_STREAMS)
    assert requests["ficoco-v", "refused"] == a_second(NUM_REFUSED)
    assert sum(value for (method, _), value in requests.items() if method == "off") == a_second(NUM_OFF)

    # Nothing runs any more; the same queries while the streams ran are below.
    assert list(query("KV cache in use").values()) == [0]
    assert list(query("KV cache in use", 1).values()) == [0]
    assert by(query("KV blocks"), "segment") == {"0": 0}
    assert by(query("KV blocks", 1), "segment") == {"0": 0}
    assert query("Running and waiting")[()] == 0
    assert query("Running and waiting", 1)[()] == 0
    assert query("Preemptions")[()] == 0

    for title in ("Time to first token", "Inter-token latency"):
        median, high = by(query(title), "method"), by(query(title, 1), "method")
        for method in ("ficoco-v", "off", "text"):
            assert 0 < median[method] <= high[method] <= 2 * traffic.slowest_seconds
    labels = {"method": "ficoco-v", "site": "tower"}
    took, count = (traffic.grown(f"ficoco:reduction_seconds_{name}", **labels) for name in ("sum", "count"))
    mean = by(query("Time of the reduction itself"), "method", "site")["ficoco-v", "tower"]
    assert mean == pytest.approx(took / count, rel=1e-3)
    assert by(query("Budget of an image"), "method")["ficoco-v"] == pytest.approx(DEMO_KEEP, rel=1e-3)
    assert by(query("Budget of an image", 1), "method")["ficoco-v"] == pytest.approx(
        48 + 0.9 * 16
    )  # bucket 48-64
    assert by(query("Budget of a request that names none"), "engine") == {"0": DEMO_KEEP}
    without_target = panels(QUALITY_ROW)
    assert {title for title, _ in left} == without_target.keys()
    assert not any(left.values()), "no target is set"
    assert traffic.unfiltered == []


@needs_prometheus
def test_every_alert_reads_what_is_there(traffic: Traffic) -> None:
    """Without its limits each expression has a value; there are no 5xx here, so it reads the 4xx."""
    assert len(traffic.alerts) == len(rules())
    empty = {name for name, values in traffic.alerts.items() if not values}
    assert empty == QUALITY_ALERTS, "no target is set"


@needs_prometheus
def test_headroom_while_requests_run(traffic: Traffic) -> None:
    during = traffic.during_queries
    saved = NUM_STREAMS * (NUM_PATCHES - DEMO_KEEP) / 128
    held = by(during["KV blocks 0"], "segment")["0"]
    assert by(during["KV blocks 1"], "segment")["0"] == saved
    assert held >= NUM_STREAMS
    usage = next(iter(during["KV cache in use 0"].values()))
    without = next(iter(during["KV cache in use 1"].values()))
    assert without / usage == pytest.approx((held + saved) / held)
    assert during["Running and waiting 0"][()] == NUM_STREAMS
    assert during["Requests running 0"][()] == NUM_STREAMS
    assert during["KV cache use 0"][()] == usage
