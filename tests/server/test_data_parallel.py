"""Two data-parallel engines of one API server: each counts under its own label."""

import urllib.request
from collections import defaultdict
from collections.abc import Iterator

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support.server import Server, budget, data_url, message, serve

NUM_PATCHES, KEEP, NUM_REQUESTS = 576, 64, 6

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model twice."""
    log = tmp_path_factory.mktemp("pair") / "log"
    arguments = ["--ficoco-method", "ficoco-v", "--ficoco-keep", str(KEEP), "--trust-request-mm-kwargs"]
    arguments += ["--data-parallel-size", "2", "--api-server-count", "1"]
    with serve(log, *arguments, "--kv-cache-memory-bytes", str(2**28)) as server:
        yield server


def by_engine(server: Server) -> dict[str, dict[str, float]]:
    """Name of each of our samples of the server's method, to its value by engine."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    result: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for family in families:
        for sample in family.samples:
            if sample.name.startswith("ficoco:") and sample.labels["method"] == "ficoco-v":
                kind = sample.labels.get("outcome") or sample.labels.get("le") or ""
                result[sample.name + kind][sample.labels["engine"]] = sample.value
    return result


def test_each_engine_counts_its_own(pair: Server) -> None:
    before = by_engine(pair)
    with pair.client() as client:
        for index in range(NUM_REQUESTS):
            for rank in range(2):
                client.chat.completions.create(
                    model="ficoco-demo",
                    messages=[message("what?", [data_url(Image.new("RGB", (64, 64), (index, rank, 9)))])],
                    max_tokens=2,
                    extra_headers={"X-data-parallel-rank": str(rank)}
                    if index < NUM_REQUESTS - 1 or rank
                    else {},
                    extra_body=budget(KEEP),
                )
    after = by_engine(pair)

    def grown(name: str) -> dict[str, float]:
        return {engine: value - before[name].get(engine, 0.0) for engine, value in after[name].items()}

    tokens = grown("ficoco:visual_tokens_in_total")
    assert set(tokens) == {"0", "1"}
    assert sum(tokens.values()) == 2 * NUM_REQUESTS * NUM_PATCHES
    assert min(tokens.values()) >= (NUM_REQUESTS - 1) * NUM_PATCHES
    kept, budgets = grown("ficoco:visual_tokens_kept_total"), grown("ficoco:budget_tokens_count")
    for engine in ("0", "1"):
        num_images = tokens[engine] / NUM_PATCHES
        assert kept[engine] == num_images * KEEP
        assert budgets[engine] == num_images
        ended = sum(grown(f"ficoco:requests_total{outcome}")[engine] for outcome in ("stop", "length"))
        assert ended == num_images
        assert after["ficoco:default_budget_tokens"][engine] == KEEP
        assert after["ficoco:kv_blocks_held"][engine] == 0
    # The towers of both workers report their time.
    assert sum(grown("ficoco:reduction_seconds_count").values()) == 2 * NUM_REQUESTS
    assert set(grown("ficoco:reduction_seconds_count")) == {"0", "1"}
