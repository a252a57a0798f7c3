"""Two replicas with vLLM's router: this repository's server, and the released wheel.

The second has two API servers and two data-parallel engines.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from ficoco_vllm.demo_model import examples
from tests.support.router import route
from tests.support.server import API_KEY, DEMO_KEEP, Server, data_url, message, serve

pytestmark = [pytest.mark.server, pytest.mark.long]

PATCHES = 576
KEPT, IMAGES_IN = "ficoco:visual_tokens_kept_total", "ficoco:visual_tokens_in_total"
BUDGETS = (None, 96, 32, 288)


@pytest.fixture(scope="module")
def replicas(
    server: Server, installed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[Server]]:
    """The server that all tests share, and one from the wheel, started where no repository is."""
    folder = tmp_path_factory.mktemp("replica")
    arguments = ["--ficoco-method", "ficoco-v", "--ficoco-keep", str(DEMO_KEEP), "--api-key", API_KEY]
    arguments += [
        "--api-server-count",
        "2",
        "--data-parallel-size",
        "2",
        "--kv-cache-memory-bytes",
        str(2**28),
    ]
    with serve(folder / "log", *arguments, python=installed, folder=folder) as second:
        yield [server, second]


@pytest.fixture(scope="module")
def router(replicas: list[Server], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The router, which clients call."""
    with route(tmp_path_factory.mktemp("router") / "log", replicas) as router:
        yield router


def ask(client: OpenAI, index: int, keep: int | None, stream: bool = False):
    """One of the demo model's questions about its own image."""
    example = examples()[index % len(examples())]
    return client.chat.completions.with_raw_response.create(
        model="ficoco-demo",
        messages=[message(example.question, [data_url(Image.open(example.image))])],
        temperature=0,
        max_tokens=8,
        stream=stream,
        extra_body={"ficoco": {"keep": keep}} if keep else {},
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )


def test_budgets_are_respected_and_metrics_add_up(replicas: list[Server], router: Server) -> None:
    before = [{name: replica.metric(name) for name in (KEPT, IMAGES_IN)} for replica in replicas]
    kept = 0
    count = 2 * len(BUDGETS)
    for index in range(count):
        keep = BUDGETS[index // 2]  # each budget once at either replica
        raw = ask(router.client(), index, keep)
        reported = raw.parse().usage.model_extra["ficoco"]
        assert reported["visual_tokens_kept"] == (keep or DEMO_KEEP)
        assert raw.headers["x-ficoco-visual-tokens-kept"] == str(keep or DEMO_KEEP)
        kept += reported["visual_tokens_kept"]
    grown = [
        {name: replica.metric(name) - old[name] for name in old}
        for replica, old in zip(replicas, before, strict=True)
    ]
    assert sum(each[KEPT] for each in grown) == kept
    assert [each[IMAGES_IN] for each in grown] == [PATCHES * count / 2] * 2


def test_replicas_answer_alike(replicas: list[Server], router: Server) -> None:
    for index in range(len(examples())):
        answers = {
            ask(server.client(), index, 96).parse().choices[0].message.content
            for server in [*replicas, router]
        }
        assert len(answers) == 1


def test_a_stream_passes_with_its_usage(router: Server) -> None:
    raw = ask(router.client(), 2, 96, stream=True)
    *_, last = raw.parse()
    assert last.usage.model_extra["ficoco"]["visual_tokens_kept"] == 96


def test_a_refusal_passes_as_it_is(router: Server) -> None:
    for index in range(2):  # either replica
        with pytest.raises(BadRequestError, match="keep") as refused:
            ask(router.client(), index, PATCHES + 1)
        assert refused.value.body["code"] == 400
