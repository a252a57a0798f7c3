"""The decoder through the OpenAI server: budgets of requests, and refusals as HTTP 400."""

import json
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.demo_model import examples
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.server.explain.schema import Explanation
from tests.support import axe, page
from tests.support.browser import chromium, why_missing
from tests.support.sampling_options import check_sweep
from tests.support.server import DTYPE, VALUE_BYTES, Server, data_url, message, serve

pytestmark = [pytest.mark.compat, pytest.mark.server]


@pytest.fixture(scope="module")
def server(small_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As `make serve METHOD=ficoco-vl` starts it: the command line alone chooses the model runner.

    Two API servers share the engine and the port, so counters must add up over processes. The budget of requests that
    name none is 16 by `--ficoco-elastic`, which never sees the load that would make it 15.
    """
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = ["--ficoco-method", "ficoco-vl", "--ficoco-keep", "15", "--served-model-name", "small"]
    arguments += ["--ficoco-explain", "--ficoco-min-keep", "4", "--ficoco-config", '{"windows": "off"}']
    more = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**26)]
    more += ["--api-server-count", "2", "--dtype", DTYPE]
    more += [
        "--override-generation-config",
        json.dumps({"top_p": 0.9}),
    ]  # as a model's own generation_config.json
    more += [
        "--ficoco-elastic",
        json.dumps({"floor": 15, "ceiling": 16, "target_kv_usage": 1, "target_queue": 99}),
    ]
    with serve(log, str(small_llava), *arguments, *more) as server:
        yield server


def complete(server: Server, images: list[Image.Image], **extra_body: Any) -> Any:
    """One greedy chat."""
    with server.client() as client:
        return client.chat.completions.create(
            model="small",
            messages=[message("what is this?", [data_url(image) for image in images])],
            max_tokens=3,
            temperature=0,
            extra_body=extra_body,
        )


def test_answers_with_the_server_s_budget_and_their_own(server: Server, images: list[Image.Image]) -> None:
    own = {"vllm_xargs": {"ficoco_keep": 5, "ficoco_method": "fastv"}}
    answers = [
        complete(server, images[:1]),
        complete(server, images[:1], **own),
        complete(server, images[:2]),
        complete(server, []),
    ]
    assert all(answer.usage.completion_tokens == 3 for answer in answers)
    # The tower leaves 48 tokens of each image, independent of the decoder.
    assert answers[1].usage.prompt_tokens == answers[0].usage.prompt_tokens
    assert answers[2].usage.prompt_tokens - answers[0].usage.prompt_tokens in (48, 49)


@pytest.mark.parametrize(
    ("extra_body", "param", "parts"),
    [
        ({"vllm_xargs": {"ficoco_keep": 49}}, "ficoco_keep", ["ficoco_keep = 49", "1 to 48"]),
        ({"vllm_xargs": {"ficoco_keep": "5"}}, "ficoco_keep", ["ficoco_keep = '5'"]),
        ({"vllm_xargs": {"ficoco_method": "tome"}}, "ficoco_method", ["'tome'", "fastv"]),
        ({"prompt_logprobs": 1}, "prompt_logprobs", ["prompt_logprobs = 1"]),
        (
            {"echo": True, "logprobs": True, "top_logprobs": 1},
            "echo",
            ["echo = True", "whole prompt"],
        ),
        ({"use_beam_search": True, "n": 2}, "use_beam_search", ["use_beam_search = True", "ficoco-vl"]),
    ],
)
def test_refusals(
    server: Server, images: list[Image.Image], extra_body: dict[str, Any], param: str, parts: list[str]
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, images[:1], **extra_body)
    body = caught.value.body
    assert isinstance(body, dict)
    assert (body["code"], body["param"]) == (400, param)
    assert all(part in body["message"] for part in parts)
    assert server.is_healthy()
    assert complete(server, images[:1]).usage.completion_tokens == 3


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_no_option_ends_the_engine(server: Server, images: list[Image.Image], route: str) -> None:
    check_sweep(server, "small", route, images[0])


@pytest.mark.parametrize(
    ("ficoco", "kept", "entering"),
    [(None, 16, 48), ({"keep": 36}, 36, 72), ({"method": "ficoco-vl", "keep": 9}, 9, 36), ("off", 144, 144)],
)
def test_the_field_reaches_tower_and_decoder(
    server: Server, images: list[Image.Image], ficoco: Any, kept: int, entering: int
) -> None:
    answer = complete(server, images[:1], **({} if ficoco is None else {"ficoco": ficoco}))
    reported = answer.usage.model_extra["ficoco"]
    assert (reported["visual_tokens"], reported["visual_tokens_kept"]) == (144, kept)
    assert reported["method"] == ("off" if ficoco == "off" else "ficoco-vl")
    config = FicocoConfig.parse({"method": "ficoco-l", "keep": kept})
    counts = DecoderPlanner.shared(config, 8, entering).counts("ficoco-l", entering, kept)
    assert (
        reported["kv_bytes_saved"] == sum(144 - count for count in counts) * 2 * 2 * 32 * VALUE_BYTES
    )  # 2 heads
    full = complete(server, images[:1], ficoco="off").usage.prompt_tokens
    assert answer.usage.prompt_tokens == full - 144 + entering


@pytest.mark.parametrize(
    ("extra_body", "param", "words"),
    [
        ({"ficoco": {"keep": 3}}, "ficoco.keep", "an integer from 4 to 144"),
        ({"ficoco": {"kv_budget": 1}}, "ficoco.kv_budget", "ficoco.kv_budget = 1"),
        ({"ficoco": {"method": "fastv"}}, "ficoco.method", "ficoco-vl, off"),
        ({"vllm_xargs": {"ficoco_keep": 3}}, "vllm_xargs.ficoco_keep", "an integer from 4 to 144"),
        ({"mm_processor_kwargs": {"ficoco_keep": 64}}, "mm_processor_kwargs", "--trust-request-mm-kwargs"),
        (
            {"ficoco": {"keep": 9}, "mm_processor_kwargs": {"size": 9}},
            "mm_processor_kwargs",
            "--trust-request-mm-kwargs",
        ),
        (
            {"ficoco": {"keep": 9}, "media_io_kwargs": {"image": {}}},
            "mm_processor_kwargs",
            "--trust-request-mm-kwargs",
        ),
    ],
)
def test_what_the_operator_does_not_allow(
    server: Server, images: list[Image.Image], extra_body: dict[str, Any], param: str, words: str
) -> None:
    """Our field does not allow other keyword arguments of the processor."""
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, images[:1], **extra_body)
    body = caught.value.body
    assert isinstance(body, dict)
    assert (body["code"], body["param"]) == (400, param)
    assert words in body["message"]


def test_an_explanation_goes_through_tower_and_decoder(server: Server, images: list[Image.Image]) -> None:
    body = {"image": data_url(images[1]), "question": "what is this?", "max_tokens": 2}
    low = httpx.post(f"{server.url}/ficoco/explain", json={**body, "keep": 3}, timeout=300)
    assert (low.status_code, low.json()["error"]["param"]) == (400, "keep")
    answer = httpx.post(f"{server.url}/ficoco/explain", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    result = Explanation.model_validate_json(answer.content)
    assert (result.method, result.keep, result.grid) == ("ficoco-vl", 15, (12, 12))
    sites = [layer.site for layer in result.layers]
    assert sites == sorted(sites, reverse=True), "first the tower, then the decoder"
    assert set(sites) == {"encoder", "decoder"}
    # The tower's budget follows the load, which is that of 16 in the end.
    assert (result.reduced.visual_tokens, result.reduced.last_visual_tokens) == (48, 15)
    assert result.full is not None
    assert (result.full.visual_tokens, result.full.last_visual_tokens) == (144, 144)
    assert result.full.prompt_tokens - result.reduced.prompt_tokens == 144 - 48
    kept = result.layers[-1].kept
    held = dict.fromkeys(kept, 1.0)
    for item in result.destinations:
        for token, share in item.targets:
            held[token] += share
    # Nothing is lost on the whole way, though the decoder counts anew.
    assert len(kept) == 15
    assert sum(held.values()) == pytest.approx(144, abs=0.1)


@pytest.mark.long
@pytest.mark.needs(why_missing() is None, f"the page's tests: {why_missing()}")
def test_the_page_goes_through_tower_and_decoder(
    server: Server, images: list[Image.Image], tmp_path: Path
) -> None:
    images[1].save(tmp_path / "image.png")
    with chromium(tmp_path / "profile") as browser:
        page.ask(browser, server.url, "small", tmp_path / "image.png", "what is this?")
        explained = "15 of 144 visual tokens are left in the last layer of the language model."
        assert browser.text("#explained").startswith(explained)
        before, *steps, result = page.captions(browser)
        assert before.startswith("Before any reduction")
        in_tower = ["layer of the vision tower" in step for step in steps]
        assert in_tower == sorted(in_tower, reverse=True), "first the tower, then the decoder"
        assert all("layer of the language model" in step for step in steps[sum(in_tower) :])
        assert 0 < sum(in_tower) < len(steps)
        assert result.startswith("Result: 15 tokens kept")
        assert len(browser.all('.patch[data-state="kept"]')) == 15
        assert len(browser.all(".patch")) == 144
        assert axe.violations(browser) == []
        assert browser.complaints() == []


def test_start_up_says_what_it_means(server: Server) -> None:
    log = server.log.read_text()
    assert "ficoco-l leaves 15 of 46 visual tokens of an image in the decoder" in log
    assert "ficoco-v keeps 46 of 144 visual tokens" in log
    assert log.count("prefix caching and chunked prefill are off: long prompts delay") == 1


def samples(server: Server, name: str, **labels: str) -> dict[str, float]:
    """One of our metrics by segment ("" where it has none), of the series with these labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        sample.labels.get("segment", ""): sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"ficoco:{name}" and labels.items() <= sample.labels.items()
    }


def test_metrics_by_segment_over_two_servers(server: Server, images: list[Image.Image]) -> None:
    """Front ends count requests, the engine core blocks, the worker seconds; each request counts once."""
    names = (
        "kv_tokens_avoided_total",
        "kv_bytes_avoided_total",
        "visual_tokens_in_total",
        "visual_tokens_kept_total",
    )
    names += ("reduction_seconds_count", "prefill_flops_avoided_total")
    method = {"method": "ficoco-vl"}
    before = [samples(server, name, **method) for name in names]
    steps = samples(server, "reduction_seconds_count", site="decoder", method="ficoco-l")
    num_requests = 6
    for index in range(num_requests):  # each on a separate connection, so that both servers get some
        complete(server, [images[index]])
    grown = []
    for name, old in zip(names, before, strict=True):
        new = samples(server, name, **method)
        grown.append({key: value - old.get(key, 0.0) for key, value in new.items()})
    # 144 patches, 48 after the tower; the decoder's 8 segments of one layer go from there to 16.
    config = FicocoConfig.parse({"method": "ficoco-l", "keep": 16})
    counts = DecoderPlanner.shared(config, 8, 48).counts("ficoco-l", 48, 16)
    assert len(set(counts)) > 3
    expected = {str(segment): num_requests * (144 - count) for segment, count in enumerate(counts)}
    assert grown[0] == expected
    assert grown[1] == {
        segment: tokens * 2 * 2 * 32 * VALUE_BYTES for segment, tokens in expected.items()
    }  # 2 heads
    assert (grown[2][""], grown[3][""]) == (num_requests * 144, num_requests * 16)
    assert grown[5][""] > 0
    now = samples(server, "reduction_seconds_count", site="decoder", method="ficoco-l")
    assert now[""] - steps[""] == num_requests
    assert samples(server, "kv_blocks_held", **method) == dict.fromkeys(expected, 0.0)
    assert samples(server, "kv_blocks_saved", **method) == dict.fromkeys(expected, 0.0)
    assert samples(server, "default_budget_tokens", **method) == {"": 16}


def test_both_servers_took_part(server: Server) -> None:
    log = server.log.read_text()
    assert "ApiServer_0" in log
    assert "ApiServer_1" in log
    assert "Found PROMETHEUS_MULTIPROC_DIR was set by user" not in log


def blocks_while_running(server: Server, image: Image.Image) -> tuple[dict[str, float], dict[str, float]]:
    """Blocks held and saved by segment, after a request's second token."""
    with server.client() as client:
        stream = client.chat.completions.create(
            model="small",
            messages=[message("what is this?", [data_url(image)])],
            max_tokens=800,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        next(iter(stream))
        held = samples(server, "kv_blocks_held", method="ficoco-vl")
        saved = samples(server, "kv_blocks_saved", method="ficoco-vl")
        stream.close()
    return held, saved


def test_blocks_of_segments_while_a_request_runs(server: Server, images: list[Image.Image]) -> None:
    """The scheduler's count equals each segment's plan, in blocks of 32."""
    for _ in range(5):
        held, saved = blocks_while_running(server, images[0])
        if any(held.values()):
            break  # else it was over before the client, on a busy machine, could ask
    assert list(held.values()) == sorted(held.values(), reverse=True)
    assert min(held.values()) >= 1
    assert list(saved.values()) == sorted(saved.values())
    deadline = time.monotonic() + 60
    while any(samples(server, "kv_blocks_held", method="ficoco-vl").values()):
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.mark.long
@pytest.mark.parametrize("method", ["ficoco-l", "ficoco-vl"])
def test_the_demo_model_as_make_serve_starts_it(
    method: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Compiled, and right about images that it has not been trained on."""
    log = tmp_path_factory.mktemp(method) / "log"
    with serve(log, "--ficoco-method", method, "--ficoco-keep", "64") as server, server.client() as client:
        right = 0
        for example in examples():
            answer = client.chat.completions.create(
                model="ficoco-demo",
                messages=[message(example.question, [data_url(example.image.read_bytes())])],
                temperature=0,
            )
            reported = answer.usage.model_extra["ficoco"] if answer.usage else {}
            assert (reported["method"], reported["visual_tokens_kept"]) == (method, 64)
            right += (answer.choices[0].message.content or "").strip() == example.answer
    assert right >= len(examples()) - 2
