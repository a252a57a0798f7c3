"""A server of InternVL with the official client: budgets, reported usage and explanations in units."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI
from PIL import Image

from ficoco_vllm.server.explain.picture import draw
from ficoco_vllm.server.explain.schema import Explanation
from tests.support.pictures import noise
from tests.support.random_internvl import UNITS
from tests.support.server import DTYPE, VALUE_BYTES, Server, data_url, message, serve

pytestmark = [pytest.mark.compat, pytest.mark.server, pytest.mark.long]

# Width and height to tiles: four and a thumbnail, and one.
TILES = {(192, 192): 5, (100, 90): 1}
TOKEN_BYTES = 3 * 2 * 2 * 32 * VALUE_BYTES  # layers, keys and values, heads, head size


@pytest.fixture(scope="module", params=["random_internvl", "random_internvl_chat"])
def internvl_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """FiCoCo-V with 9 tokens a tile, of a checkpoint in Hugging Face's format, and in OpenGVLab's."""
    arguments = [
        str(request.getfixturevalue(request.param)),
        "--served-model-name",
        "internvl",
        "--enforce-eager",
        "--ficoco-explain",
    ]
    arguments += ["--ficoco-method", "ficoco-v", "--ficoco-keep", "9", "--ficoco-explain-rate", "0"]
    arguments += ["--kv-cache-memory-bytes", str(2**28), "--max-model-len", "2048", "--dtype", DTYPE]
    if request.param == "random_internvl_chat":
        arguments += ["--trust-remote-code"]
    with serve(tmp_path_factory.mktemp("internvl-server") / "log", *arguments) as server:
        yield server


@pytest.fixture
def chat(internvl_server: Server) -> Iterator[OpenAI]:
    """The official client."""
    with internvl_server.client() as client:
        yield client


def ask(client: OpenAI, sizes: list[tuple[int, int]], ficoco: Any = None) -> Any:
    """Ask about images of these sizes, and return the usage."""
    urls = [data_url(image) for image in noise(sizes, seed=3)]
    answer = client.chat.completions.create(
        model="internvl",
        messages=[message("how many?", urls)],
        max_tokens=2,
        temperature=0,
        extra_body=None if ficoco is None else {"ficoco": ficoco},
    )
    return answer.usage


@pytest.mark.parametrize(
    ("ficoco", "method", "kept"),
    [
        (None, "ficoco-v", 9),
        ({"keep": 16}, "ficoco-v", 16),
        ({"method": "divprune", "keep": 4}, "divprune", 4),
        ("off", "off", UNITS),
    ],
)
def test_requested_and_reported(chat: OpenAI, ficoco: Any, method: str, kept: int) -> None:
    sizes = list(TILES)
    num_tiles = sum(TILES.values())
    full, usage = ask(chat, sizes, "off"), ask(chat, sizes, ficoco)
    assert full.prompt_tokens - usage.prompt_tokens == num_tiles * (UNITS - kept)
    assert usage.ficoco == {
        "method": method,
        "visual_tokens": num_tiles * UNITS,
        "visual_tokens_kept": num_tiles * kept,
        "kv_bytes_saved": num_tiles * (UNITS - kept) * TOKEN_BYTES,
    }


def test_refused(chat: OpenAI) -> None:
    with pytest.raises(BadRequestError, match="keep = 37 is not allowed; allowed: an integer from 1 to 36"):
        ask(chat, [(192, 192)], {"keep": UNITS + 1})


@pytest.mark.parametrize(("size", "num_tiles"), list(TILES.items()))
def test_explained_in_units(internvl_server: Server, size: tuple[int, int], num_tiles: int) -> None:
    """Every unit is kept or has left, in its tile; views are grids of units."""
    (image,) = noise([size], seed=3)
    body = {"image": data_url(image), "question": "how many?", "max_tokens": 2}
    answer = httpx.post(f"{internvl_server.url}/ficoco/explain", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    result = Explanation.model_validate_json(answer.content)
    assert [view.grid for view in result.views] == [(6, 6)] * num_tiles
    assert [view.tile for view in result.views][-1] is None
    assert result.views[-1].box == (0, 0, 1, 1)
    if num_tiles == 5:
        assert [view.box for view in result.views[:4]] == [
            (0, 0, 0.5, 0.5),
            (0.5, 0, 0.5, 0.5),
            (0, 0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5, 0.5),
        ]
    assert result.full is not None
    assert (result.full.visual_tokens, result.reduced.visual_tokens) == (num_tiles * UNITS, num_tiles * 9)
    last = result.layers[-1].kept
    assert len(last) == num_tiles * 9
    left = {item.token for item in result.destinations}
    assert {*last, *left} == set(range(num_tiles * UNITS))
    for item in result.destinations:
        assert {token // UNITS for token, _ in item.targets} <= {item.token // UNITS}, (
            "a tile is reduced alone"
        )
    assert draw(Image.new("RGB", size), result).width == 1120
