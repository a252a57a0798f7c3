"""A server of LLaVA-NeXT: allowed requests, reported usage, metrics and explanations."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.server.explain.picture import draw
from ficoco_vllm.server.explain.schema import Explanation
from ficoco_vllm.server.request_field.resolve import UNBOUNDED, Resolved, Resolver
from ficoco_vllm.server.request_field.schema import FicocoRequest
from tests.planning.test_tiles import config
from tests.support import axe, page
from tests.support.browser import chromium, why_missing
from tests.support.pictures import noise
from tests.support.server import DTYPE, VALUE_BYTES, Server, data_url, message, serve

pytestmark = pytest.mark.compat

# Width and height to the visual tokens without reduction: 96 pixels are 12 patches. Four tiles and 24 newlines; three
# tiles of which 4 lines of patches show the image, with as many newlines.
SIZES = {(192, 192): 5 * 144 + 24, (300, 40): 144 + 3 * 48 + 4}
TOKEN_BYTES = 3 * 2 * 2 * 32 * VALUE_BYTES  # layers, keys and values, heads, head size


def images() -> list[str]:
    """One image of each size."""
    return [data_url(image) for image in noise(list(SIZES), seed=3)]


@pytest.fixture(scope="module")
def next_server(random_next: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """FiCoCo-V with 16 tokens a tile."""
    arguments = [str(random_next), "--served-model-name", "next", "--enforce-eager", "--ficoco-explain"]
    arguments += ["--ficoco-method", "ficoco-v", "--ficoco-keep", "16"]
    arguments += ["--kv-cache-memory-bytes", str(2**28), "--max-model-len", "2048", "--dtype", DTYPE]
    with serve(tmp_path_factory.mktemp("next-server") / "log", *arguments) as server:
        yield server


def post(server: Server, urls: list[str], ficoco: Any = None) -> httpx.Response:
    """Ask about images."""
    chat = {"model": "next", "messages": [message("how many?", urls)], "max_tokens": 2, "temperature": 0}
    body = chat | ({} if ficoco is None else {"ficoco": ficoco})
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=300)


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize(
    ("ficoco", "method", "kept"),
    [
        (None, "ficoco-v", (5 * 16 + 2, 4 * 16 + 1)),
        ({"keep": 100}, "ficoco-v", (5 * 100 + 2, 100 + 3 * 48 + 1)),
        ({"method": "tome", "keep": 40}, "tome", (5 * 40 + 2, 4 * 40 + 1)),
        ("off", "off", tuple(SIZES.values())),
    ],
)
def test_requested_and_reported(next_server: Server, ficoco: Any, method: str, kept: tuple[int, int]) -> None:
    full = post(next_server, images(), "off").json()["usage"]["prompt_tokens"]
    for urls, before, after in (
        (images()[:1], [*SIZES.values()][:1], kept[:1]),
        (images(), [*SIZES.values()], kept),
    ):
        answer = post(next_server, urls, ficoco)
        assert answer.status_code == 200, answer.text
        usage = answer.json()["usage"]
        assert usage["ficoco"] == {
            "method": method,
            "visual_tokens": sum(before),
            "visual_tokens_kept": sum(after),
            "kv_bytes_saved": (sum(before) - sum(after)) * TOKEN_BYTES,
        }
    assert usage["prompt_tokens"] == full - sum(before) + sum(after)


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize(
    ("ficoco", "message"),
    [
        ({"keep": 145}, "ficoco.keep = 145 is not allowed; allowed: an integer from 1 to 144"),
        ({"method": "evit", "keep": 1}, "ficoco.keep = 1"),
    ],
)
def test_refused(next_server: Server, ficoco: Any, message: str) -> None:
    answer = post(next_server, images(), ficoco)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.server
@pytest.mark.long
def test_metrics_count_tiles_crops_and_newlines(next_server: Server) -> None:
    names = [
        f"ficoco:{name}_total" for name in ("visual_tokens_in", "visual_tokens_kept", "kv_tokens_avoided")
    ]
    names.append("ficoco:prefill_flops_avoided_total")
    before = [next_server.metric(name) for name in names]
    assert post(next_server, images()).status_code == 200
    seen, kept, avoided, flops = (
        next_server.metric(name) - value for name, value in zip(names, before, strict=True)
    )
    assert (seen, kept) == (sum(SIZES.values()), 5 * 16 + 2 + 4 * 16 + 1)
    assert avoided == seen - kept
    # What the decoder alone saves: its layers' matrices, on each token that is missing.
    matrices = 3 * (4 * 128 * (128 + 64) + 6 * 128 * 256)
    assert flops > avoided * matrices


@pytest.mark.server
@pytest.mark.long
def test_the_page_counts_tokens_of_a_tile(next_server: Server) -> None:
    options = httpx.get(f"{next_server.url}/ficoco/options").json()
    assert (options["keep"], options["max_keep"], options["keep_per"]) == (16, 144, "tile")


@pytest.mark.server
@pytest.mark.long
@pytest.mark.parametrize(
    ("ficoco", "kept", "fused"),
    [
        ({}, ((5 * 16, 5 * 16 + 2), (4 * 16, 4 * 16 + 1)), 0),
        ({"method": "evit", "keep": 40}, ((5 * 40, 5 * 40 + 2), (4 * 40, 4 * 40 + 1)), None),
        ({"method": "topk-cls", "keep": 100}, ((5 * 100, 5 * 100 + 2), (100 + 3 * 48, 100 + 3 * 48 + 1)), 0),
    ],
    ids=["encoder", "fused", "features"],
)
def test_explained(next_server: Server, ficoco: Any, kept: Any, fused: int | None, tmp_path: Path) -> None:
    """Every patch that shows the image is kept or has left, in its tile; the answer's counts are the prompt's."""
    for (width, height), url, (num_kept, num_tokens) in zip(SIZES, images(), kept, strict=True):
        body = {"image": url, "question": "how many?", "max_tokens": 2, **ficoco}
        answer = httpx.post(f"{next_server.url}/ficoco/explain", json=body, timeout=300)
        assert answer.status_code == 200, answer.text
        result = Explanation.model_validate_json(answer.content)
        base, *tiles = result.views
        assert (base.grid, base.tile, base.box) == ((12, 12), None, (0, 0, 1, 1))
        assert {view.grid for view in tiles} == {(12, 12) if height == width else (4, 12)}
        assert result.full is not None
        assert result.full.visual_tokens == SIZES[width, height]
        assert result.reduced.visual_tokens == result.reduced.last_visual_tokens == num_tokens
        assert result.full.prompt_tokens - result.reduced.prompt_tokens == SIZES[width, height] - num_tokens
        num_patches = sum(view.grid[0] * view.grid[1] for view in result.views)
        last = result.layers[-1].kept
        assert len(last) == num_kept
        seen = {
            token for token in (*last, *(item.token for item in result.destinations)) if token < num_patches
        }
        assert seen == set(range(num_patches))
        starts = [view.first for view in result.views]
        for item in result.destinations if fused == 0 else ():
            places = {bisect_right(starts, token) for token, _ in item.targets}
            assert places <= {bisect_right(starts, item.token)}, "a tile is reduced alone"
        picture = draw(Image.new("RGB", (width, height), (200, 200, 10)), result)
        assert picture.width == 1120


@pytest.mark.server
@pytest.mark.long
@pytest.mark.needs(why_missing() is None, f"the page's tests: {why_missing()}")
def test_the_page_shows_the_tiles(next_server: Server, tmp_path: Path) -> None:
    """Images with whole tiles, and with tiles whose upper and lower rows are padding."""
    for (width, height), image in zip(SIZES, noise(list(SIZES), seed=3), strict=True):
        num_tiles, num_patches = (4, 5 * 144) if height == width else (3, 144 + 3 * 48)
        image.save(tmp_path / "image.png")
        with chromium(tmp_path / f"profile-{width}") as browser:
            page.ask(browser, next_server.url, "next", tmp_path / "image.png", "how many?")
            assert [caption.text for caption in browser.all("figcaption")] == [
                "Base tile: the whole image",
                f"{num_tiles} tiles of higher resolution",
            ]
            assert page.captions(browser)[-1].startswith(f"Result: {(1 + num_tiles) * 16} tokens kept")
            assert len(browser.all(".patch")) == num_patches
            assert len(browser.all('.patch[data-state="kept"]')) == (1 + num_tiles) * 16
            assert axe.violations(browser) == []
            assert browser.complaints() == []


@pytest.mark.parametrize(
    ("settings", "off", "keep", "most"),
    [
        ({"method": "ficoco-v"}, Resolved({"ficoco_keep": 576}), Resolved({"ficoco_keep": 300}), 576),
        (
            {"method": "ficoco-v", "keep_per": "image"},
            Resolved({"ficoco_keep": 2880}),
            Resolved({"ficoco_keep": 300}),
            2880,
        ),
        (
            {"method": "ficoco-l"},
            Resolved({}, {"ficoco_keep": 2928}),
            Resolved({}, {"ficoco_keep": 300}),
            2928,
        ),
        (
            {"method": "ficoco-vl"},
            Resolved({"ficoco_keep": 576}, {"ficoco_keep": 2928}),
            Resolved({"ficoco_keep": 415}, {"ficoco_keep": 300}),
            2928,
        ),
    ],
)
def test_arguments_of_processor_and_decoder(
    settings: dict[str, Any], off: Resolved, keep: Resolved, most: int
) -> None:
    """LLaVA-NeXT-7B: all of a tile, of an image's patches, of an image's tokens. 415 is the mean of 576 and 300."""
    served = FicocoConfig.parse(settings)
    resolver = Resolver(ServerPlan.of(served, config()), UNBOUNDED)
    assert resolver.resolve("off") == off
    assert resolver.resolve(FicocoRequest(keep=300)) == keep
    with pytest.raises(ValueError, match=f"keep = {most + 1} .* 1 to {most}"):
        resolver.resolve(FicocoRequest(keep=most + 1))
