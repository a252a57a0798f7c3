"""InternVL and a mixture of experts of Qwen3-VL that reduce twice, through the OpenAI server, with cached turns."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ficoco_vllm.server.explain.schema import Explanation
from tests.support import random_internvl, random_qwen
from tests.support.pictures import noise
from tests.support.server import DTYPE, Server, data_url, message, serve

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]

BLOCK = 32
IMAGE = data_url(noise([(300, 200)], seed=3)[0])


@dataclass(frozen=True)
class Served:
    """A server of a model.

    Attributes:
        server: of it.
        num_units: of `IMAGE`.
        counts: from the budget that a request names to the tokens of `IMAGE` that leave the tower, and those that the
            last segment holds. The former is the geometric mean of units and budget for each of InternVL's seven tiles,
            and three times the budget in Qwen3-VL; the latter is the budget, less so much that the decoder removes
            whole blocks, where it can.
    """

    server: Server
    num_units: int
    counts: dict[int | None, tuple[int, int]]


@pytest.fixture(scope="module", params=["internvl", "qwen3-vl-moe"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """FiCoCo-VL as its defaults are: windows end with a turn, and are cached."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "internvl":
        random_internvl.build(folder, decoder_layers=8)
        num_units = 7 * random_internvl.UNITS
        counts = {None: (7 * 18, 9), 16: (7 * 24, 16 - 8), 4: (7 * 12, 4)}
    else:
        random_qwen.build(folder, decoder_layers=8, experts=4)
        num_units = 10 * 15
        counts = {None: (27, 9), 16: (48, 16), 4: (12, 4)}
    arguments = [str(folder), "--served-model-name", "small", "--enforce-eager", "--ficoco-explain"]
    arguments += ["--ficoco-method", "ficoco-vl", "--ficoco-keep", "9", "--enable-prompt-tokens-details"]
    arguments += ["--kv-cache-memory-bytes", str(2**28), "--max-model-len", "2048", "--dtype", DTYPE]
    with serve(folder / "log", *arguments) as server:
        yield Served(server, num_units, counts)


def complete(served: Served, messages: list[dict[str, Any]], ficoco: Any = None) -> dict[str, Any]:
    """Usage of a greedy answer."""
    body = {} if ficoco is None else {"ficoco": ficoco}
    with served.server.client() as client:
        answer = client.chat.completions.create(
            model="small", messages=messages, max_tokens=2, temperature=0, extra_body=body
        )
    usage: dict[str, Any] = answer.model_dump()["usage"]
    return usage


@pytest.mark.parametrize("keep", [None, 16, 4])
def test_budgets_of_requests(served: Served, keep: int | None) -> None:
    asked = [message("what is this?", [IMAGE])]
    full = complete(served, asked, "off")
    usage = complete(served, asked, None if keep is None else {"keep": keep})
    entering, kept = served.counts[keep]
    assert full["ficoco"]["visual_tokens_kept"] == served.num_units
    assert usage["prompt_tokens"] == full["prompt_tokens"] - served.num_units + entering
    reported = usage["ficoco"]
    assert reported.pop("kv_bytes_saved") > 0
    assert reported == {
        "method": "ficoco-vl",
        "visual_tokens": served.num_units,
        "visual_tokens_kept": kept,
    }


def test_a_later_turn_finds_the_window_of_the_first(served: Served) -> None:
    first = [message("what is this here?", [IMAGE])]
    later = [*first, {"role": "assistant", "content": "a sign"}, message("and now?", [])]
    usage = [complete(served, turns, {"keep": 16}) for turns in (first, later)]
    assert usage[1]["prompt_tokens_details"]["cached_tokens"] == usage[0]["prompt_tokens"] // BLOCK * BLOCK


def test_refused_with_400(served: Served) -> None:
    for ficoco, words in (
        ({"keep": 0}, "ficoco.keep = 0 is not allowed; allowed: an integer from 1 to"),
        ({"method": "ficoco-l"}, "ficoco.method = 'ficoco-l' is not allowed"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            complete(served, [message("what is this?", [IMAGE])], ficoco)


def test_explained_in_tower_and_decoder(served: Served) -> None:
    body = {"image": IMAGE, "question": "what is this?", "max_tokens": 2}
    answer = httpx.post(f"{served.server.url}/ficoco/explain", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    explanation = Explanation.model_validate_json(answer.content)
    assert {layer.site for layer in explanation.layers} == {"encoder", "decoder"}
    reduced = explanation.reduced
    assert (reduced.visual_tokens, reduced.last_visual_tokens) == served.counts[None]
