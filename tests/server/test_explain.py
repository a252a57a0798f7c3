"""`POST /ficoco/explain` and `ficoco-vllm explain` against a real server."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from ficoco_vllm.demo_model import Example, examples
from ficoco_vllm.server.cli import main
from ficoco_vllm.server.explain.schema import Explanation
from tests.support.server import API_KEY, DEMO_KEEP, VALUE_BYTES, Server, data_url

NUM_PATCHES = 576
# The demo model: 8 layers, keys and values, 4 heads of 32.
TOKEN_BYTES = 8 * 2 * 4 * 32 * VALUE_BYTES

STATIC = Path(__file__).parents[2] / "server" / "static"

pytestmark = pytest.mark.server


def post(server: Server, body: dict[str, Any], key: str = API_KEY) -> httpx.Response:
    return httpx.post(
        f"{server.url}/ficoco/explain", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=120
    )


def question(example: Example, **more: Any) -> dict[str, Any]:
    return {"image": data_url(Image.open(example.image)), "question": example.question, **more}


def explain(server: Server, example: Example, **more: Any) -> Explanation:
    answer = post(server, question(example, **more))
    assert answer.status_code == 200, answer.text
    return Explanation.model_validate_json(answer.content)


def assert_every_patch_is_somewhere(explanation: Explanation) -> None:
    """Kept in the end, or left, with a destination or lost; what is held adds up to what the engine counted."""
    last = explanation.layers[-1]
    held = {token: float(token < NUM_PATCHES) for token in last.kept}  # a fused token is made of others
    for item in explanation.destinations:
        assert sum(share for _, share in item.targets) + item.rest + item.lost == pytest.approx(1, abs=1e-3)
        for token, share in item.targets:
            held[token] += share if item.token < NUM_PATCHES else 0.0
    if not any(item.rest for item in explanation.destinations):
        assert [held[token] for token in last.kept] == pytest.approx(last.sizes, abs=1e-2)
    left = [item.token for item in explanation.destinations]
    patches = {token for token in (*last.kept, *left) if token < NUM_PATCHES}
    assert patches == set(range(NUM_PATCHES))
    assert not set(left) & set(last.kept)


@pytest.mark.parametrize("example", examples()[:2], ids=lambda example: example.question)
def test_both_answers_and_the_way_of_every_patch(server: Server, example: Example) -> None:
    result = explain(server, example)
    assert result.reduced.answer.strip() == example.answer
    assert result.full is not None
    assert result.full.answer.strip() == example.answer
    assert (result.method, result.keep, result.grid, result.central_square) == (
        "ficoco-v",
        DEMO_KEEP,
        (24, 24),
        1.0,
    )
    assert [(layer.site, layer.layer, len(layer.kept)) for layer in result.layers] == [
        ("encoder", 3, 448),
        ("encoder", 4, 320),
        ("encoder", 5, 192),
        ("encoder", 6, 64),
    ]
    assert (result.reduced.visual_tokens, result.full.visual_tokens) == (DEMO_KEEP, NUM_PATCHES)
    assert result.full.prompt_tokens - result.reduced.prompt_tokens == NUM_PATCHES - DEMO_KEEP
    for side in (result.reduced, result.full):
        assert side.kv_bytes == side.prompt_tokens * TOKEN_BYTES
        assert 0 < side.ttft_seconds <= side.total_seconds
    assert_every_patch_is_somewhere(result)
    # FiCoCo-V merges: nothing is lost.
    assert sum(result.layers[-1].sizes) == pytest.approx(NUM_PATCHES, abs=1e-2)


@pytest.mark.parametrize(
    ("method", "sites", "fused"),
    [("tome", {"encoder"}, 0), ("evit", {"encoder"}, 1), ("topk-cls", {"features"}, 0)],
)
def test_other_methods(server: Server, method: str, sites: set[str], fused: int) -> None:
    result = explain(server, examples()[0], method=method, keep=100, compare=False)
    assert result.full is None
    assert (result.method, result.keep, result.reduced.method) == (method, 100, method)
    assert {layer.site for layer in result.layers} == sites
    assert {layer.num_fused for layer in result.layers} == {fused}
    assert len(result.layers[-1].kept) == result.reduced.visual_tokens == 100
    assert_every_patch_is_somewhere(result)
    lost = {item.lost for item in result.destinations}
    assert lost == ({1.0} if method == "topk-cls" else {0.0})


def test_nothing_is_reduced(server: Server) -> None:
    result = explain(server, examples()[0], keep=NUM_PATCHES, compare=False)
    assert (result.layers, result.destinations) == ([], [])
    assert result.reduced.visual_tokens == NUM_PATCHES


def test_a_repeated_explanation_is_the_same(server: Server) -> None:
    """No cache answers in place of the tower: the trace is there again."""
    first, second = (explain(server, examples()[3], compare=False) for _ in range(2))
    assert first.layers == second.layers
    assert first.destinations == second.destinations


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"keep": 0}, ["keep"]),
        ({"keep": 577}, ["577", "576"]),
        ({"keep": "64"}, ["keep"]),
        ({"method": "fastv"}, ["'fastv'", "ficoco-v"]),
        ({"method": "no such"}, ["'no such'", "ficoco-v"]),
        ({"unknown": 1}, ["unknown"]),
        ({"question": "  "}, ["question"]),
        ({"question": "a" * 4001}, ["question"]),
        ({"max_tokens": 513}, ["max_tokens"]),
        ({"image": "data:image/png;base64,AAAA"}, ["image"]),
        ({"image": "file:///etc/passwd"}, ["image_url", "file"]),
        ({"image": "nonsense"}, ["URL"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_requests(server: Server, change: dict[str, Any], parts: list[str]) -> None:
    answer = post(server, question(examples()[0]) | change)
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert all(part in message for part in parts), message
    assert server.is_healthy()


def test_a_wrong_trace_id_is_refused(server: Server) -> None:
    body = {
        "model": "ficoco-demo",
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": question(examples()[0])["image"]}}],
            }
        ],
        "mm_processor_kwargs": {"ficoco_trace": "x"},
    }
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {API_KEY}"},
        timeout=60,
    )
    assert answer.status_code == 400
    assert "ficoco_trace = 'x'" in answer.json()["error"]["message"]


def test_the_key_is_required(server: Server) -> None:
    assert post(server, question(examples()[0]), key="wrong").status_code == 401
    assert httpx.get(f"{server.url}/ficoco/options").status_code == 401


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(server: Server) -> None:
    page = httpx.get(f"{server.url}/ficoco", follow_redirects=True)
    assert page.status_code == 200
    assert page.url.path == "/ficoco/"
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    for name in (path.name for path in STATIC.iterdir()):
        file = httpx.get(f"{server.url}/ficoco/{name}")
        assert file.status_code == 200
        text = file.text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text
    for name in ("nothing.js", "..%2fserve.py", "%2e%2e%2fserve.py"):
        assert httpx.get(f"{server.url}/ficoco/{name}").status_code == 404


def test_options(server: Server) -> None:
    answer = httpx.get(f"{server.url}/ficoco/options", headers={"Authorization": f"Bearer {API_KEY}"})
    options = answer.json()
    assert (options["model"], options["method"], options["keep"]) == ("ficoco-demo", "ficoco-v", DEMO_KEEP)
    assert (options["min_keep"], options["max_keep"]) == (1, NUM_PATCHES)
    names = [method["name"] for method in options["methods"]]
    assert {"ficoco-v", "tome", "topk-cls"} <= set(names)
    assert "fastv" not in names
    assert all(method["summary"].endswith(".") for method in options["methods"])
    for choice, example in zip(options["examples"], examples(), strict=True):
        assert choice["question"] == example.question
        assert httpx.get(f"{server.url}/ficoco/{choice['image']}").content == example.image.read_bytes()
    for name in ("none.png", "examples.json", "..%2findex.html"):
        assert httpx.get(f"{server.url}/ficoco/examples/{name}").status_code == 404


def test_the_command_draws_a_picture(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example, out, data = examples()[2], tmp_path / "picture.png", tmp_path / "data.json"
    arguments = ["explain", str(example.image), example.question, "--out", str(out), "--json", str(data)]
    arguments += ["--url", f"{server.url}/v1", "--api-key", API_KEY, "--keep", "128", "--patch", "1,1"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert f"ficoco-v, 128 kept: {example.answer} (128 visual tokens" in printed.out
    assert f"without reduction: {example.answer} (576 visual tokens" in printed.out
    result = Explanation.model_validate(json.loads(data.read_text()))
    assert len(result.layers[-1].kept) == 128
    with Image.open(out) as picture:
        assert picture.width == 1120
        assert picture.height > 600


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--keep", "0"], "answered 400"),
        (["--method", "none such"], "'none such'"),
        (["--patch", "25,1"], "--patch = '25,1' is not allowed; allowed: ROW,COLUMN from 1,1 to 24,24"),
        (["--api-key", "wrong"], "requires its API key"),
    ],
)
def test_the_command_refuses(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    example = examples()[2]
    arguments = ["explain", str(example.image), example.question, "--out", str(tmp_path / "picture.png")]
    assert main([*arguments, "--url", server.url, "--api-key", API_KEY, *more]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert part in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "picture.png").exists()


@pytest.mark.long
def test_the_command_with_a_server_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example, out = examples()[2], tmp_path / "picture.jpg"
    assert main(["explain", str(example.image), example.question, "--out", str(out), "--method", "tome"]) == 0
    printed = capsys.readouterr()
    assert "starting a server for this picture" in printed.err
    assert "tome, 64 kept: " in printed.out
    with Image.open(out) as picture:
        assert picture.width == 1120


def test_a_server_of_its_own_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "explain",
        str(examples()[2].image),
        "?",
        "--out",
        str(tmp_path / "out.png"),
        "--keep",
        "577",
    ]
    assert main(arguments) == 1
    assert "error: ficoco.keep = 577 is not allowed" in capsys.readouterr().err
