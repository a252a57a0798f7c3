"""The decoder behind the OpenAI server: budgets of requests, and refusals as HTTP 400."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from ficoco_vllm.server.explain.schema import Explanation
from tests.support.server import Server, data_url, message, serve

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server(small_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """As `make serve METHOD=ficoco-vl` starts it: the command line alone chooses the model runner."""
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = [
        "--ficoco-method",
        "ficoco-vl",
        "--ficoco-keep",
        "16",
        "--served-model-name",
        "small",
        "--ficoco-explain",
    ]
    more = ["--enforce-eager", "--max-model-len", "1024", "--kv-cache-memory-bytes", str(2**26)]
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
    # The tower leaves 48 tokens of each image, whatever is left in the decoder.
    assert answers[1].usage.prompt_tokens == answers[0].usage.prompt_tokens
    assert answers[2].usage.prompt_tokens - answers[0].usage.prompt_tokens in (48, 49)


@pytest.mark.parametrize(
    ("extra_body", "param", "parts"),
    [
        ({"vllm_xargs": {"ficoco_keep": 49}}, "ficoco_keep", ["ficoco_keep = 49", "1 to 48"]),
        ({"vllm_xargs": {"ficoco_keep": "5"}}, "ficoco_keep", ["ficoco_keep = '5'"]),
        ({"vllm_xargs": {"ficoco_method": "tome"}}, "ficoco_method", ["'tome'", "fastv"]),
        ({"prompt_logprobs": 1}, "prompt_logprobs", ["prompt_logprobs = 1"]),
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


def test_an_explanation_goes_through_tower_and_decoder(server: Server, images: list[Image.Image]) -> None:
    body = {"image": data_url(images[1]), "question": "what is this?", "max_tokens": 2}
    answer = httpx.post(f"{server.url}/ficoco/explain", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    found = Explanation.model_validate_json(answer.content)
    assert (found.method, found.keep, found.grid) == ("ficoco-vl", 16, (12, 12))
    sites = [layer.site for layer in found.layers]
    assert sites == sorted(sites, reverse=True), "first the tower, then the decoder"
    assert set(sites) == {"encoder", "decoder"}
    assert (found.reduced.visual_tokens, found.reduced.last_visual_tokens) == (48, 16)
    assert found.full is not None
    assert (found.full.visual_tokens, found.full.last_visual_tokens) == (144, 144)
    assert found.full.prompt_tokens - found.reduced.prompt_tokens == 144 - 48
    kept = found.layers[-1].kept
    held = dict.fromkeys(kept, 1.0)
    for item in found.destinations:
        for token, share in item.targets:
            held[token] += share
    # Nothing is lost on the whole way, though the decoder counts anew.
    assert len(kept) == 16
    assert sum(held.values()) == pytest.approx(144, abs=0.1)


def test_start_up_says_what_it_means(server: Server) -> None:
    log = server.log.read_text()
    assert "ficoco-l leaves 16 of 48 visual tokens of an image in the decoder" in log
    assert "ficoco-v keeps 48 of 144 visual tokens" in log
    assert "no prompt can take over the cached prefix of another" in log
