"""A server of Qwen3-VL: budgets of requests, reported usage, refusals and explanations."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from ficoco_vllm.server.explain.picture import draw
from ficoco_vllm.server.explain.schema import Explanation
from tests.support.pictures import noise
from tests.support.server import DTYPE, VALUE_BYTES, Server, data_url, message, serve

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]

# Width and height to the units without reduction: 12 x 12 and 10 x 15.
SIZES = {(192, 192): 144, (300, 200): 150}
TOKEN_BYTES = 4 * 2 * 2 * 32 * VALUE_BYTES  # layers, keys and values, heads, head size


@pytest.fixture(scope="module")
def qwen_server(random_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """FiCoCo-V with a quarter of the tokens."""
    arguments = [str(random_qwen), "--served-model-name", "qwen", "--enforce-eager", "--ficoco-explain"]
    arguments += ["--ficoco-method", "ficoco-v", "--ficoco-keep-ratio", "0.25"]
    arguments += ["--kv-cache-memory-bytes", str(2**28), "--max-model-len", "2048", "--dtype", DTYPE]
    with serve(tmp_path_factory.mktemp("qwen-server") / "log", *arguments) as server:
        yield server


def images() -> list[str]:
    """One image of each size."""
    return [data_url(image) for image in noise(list(SIZES), seed=3)]


def ask(client: OpenAI, ficoco: Any = None) -> Any:
    """Usage of a chat about both images."""
    body = {} if ficoco is None else {"ficoco": ficoco}
    answer = client.chat.completions.create(
        model="qwen", messages=[message("which?", images())], max_tokens=2, temperature=0, extra_body=body
    )
    return answer.model_dump()["usage"]


@pytest.mark.parametrize(
    ("ficoco", "method", "kept"),
    [
        (None, "ficoco-v", (36, 38)),
        ({"keep": 20}, "ficoco-v", (20, 20)),
        ({"keep": 148}, "ficoco-v", (144, 148)),
        ({"method": "divprune", "keep_ratio": 0.1}, "divprune", (14, 15)),
        ({"method": "downscale", "keep": 20}, "downscale", (16, 3 * 5)),
        ("off", "off", (144, 150)),
    ],
)
def test_requested_and_reported(qwen_server: Server, ficoco: Any, method: str, kept: tuple[int, int]) -> None:
    with qwen_server.client() as client:
        full, usage = ask(client, "off"), ask(client, ficoco)
    before = sum(SIZES.values())
    assert usage["ficoco"] == {
        "method": method,
        "visual_tokens": before,
        "visual_tokens_kept": sum(kept),
        "kv_bytes_saved": (before - sum(kept)) * TOKEN_BYTES,
    }
    assert usage["prompt_tokens"] == full["prompt_tokens"] - before + sum(kept)


@pytest.mark.parametrize(
    ("ficoco", "message"),
    [
        ({"keep": 161}, "ficoco.keep = 161 is not allowed; allowed: an integer from 1 to 160"),
        ({"keep_ratio": 1.5}, "ficoco.keep_ratio = 1.5 is not allowed; allowed: a number above 0, at most 1"),
        ({"keep_ratio": "half"}, "ficoco.keep_ratio = 'half' is not allowed"),
        (
            {"keep_ratio": 0.5, "keep": 3},
            "ficoco.keep_ratio = 0.5 together with ficoco.keep = 3 is not allowed",
        ),
        ({"method": "fastv"}, "ficoco.method = 'fastv' is not allowed, since it reduces in the decoder"),
    ],
)
def test_refused_with_400(qwen_server: Server, ficoco: Any, message: str) -> None:
    body = {"model": "qwen", "messages": [], "ficoco": ficoco}
    body["messages"] = [{"role": "user", "content": "hi"}]
    answer = httpx.post(f"{qwen_server.url}/v1/chat/completions", json=body, timeout=300)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(message)


def test_explained_unit_by_unit(qwen_server: Server) -> None:
    url = f"{qwen_server.url}/ficoco/explain"
    request = {"image": images()[1], "question": "how many?", "max_tokens": 2}
    answer = httpx.post(url, json=request, timeout=300)
    assert answer.status_code == 200, answer.text
    explanation = Explanation.model_validate(answer.json())
    (view,) = explanation.views
    assert (view.grid, tuple(view.box), view.tile) == ((10, 15), (0, 0, 1, 1), None)
    assert (explanation.keep, explanation.reduced.visual_tokens) == (38, 38)
    assert sum(1 for place in explanation.destinations if place is None) <= 150
    assert draw(noise(list(SIZES), seed=3)[1], explanation).width
    named = httpx.post(url, json={**request, "keep": 9, "method": "divprune"}, timeout=300).json()
    assert (named["keep"], named["reduced"]["visual_tokens"]) == (9, 9)
    refused = httpx.post(url, json={**request, "method": "downscale"}, timeout=300)
    assert refused.status_code == 400
    assert "no reduction to explain" in refused.text
