"""The parts of an explanation that need no server: bytes, limits, plugins, the picture, the command's own errors."""

import asyncio
import json
import os
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, HTTPException
from PIL import Image, ImageDraw
from starlette.datastructures import Headers

from ficoco_vllm import environment
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.cli import main
from ficoco_vllm.server.endpoint import FicocoEndpoint
from ficoco_vllm.server.explain import routes
from ficoco_vllm.server.explain.guard import RateLimiter, api_keys, check_key
from ficoco_vllm.server.explain.picture import Panel, draw, examples, panels
from ficoco_vllm.server.explain.schema import MAX_TARGETS, Explanation, Layer, Left, Measured, View
from ficoco_vllm.server.explain.served_model import ServedModel, central_square, choice
from ficoco_vllm.server.explain.views import TracedImage
from ficoco_vllm.tracing.chain import Departure, Step

RED, GREEN, WHITE = (211, 34, 42), (15, 140, 80), (255, 255, 255)


def served(num_layers: int = 8, in_decoder: bool = True, with_cls: bool = False) -> ServedModel:
    shape = TowerShape(grid=(4, 4), num_layers=8, num_executed_layers=7, with_cls=with_cls)
    return ServedModel(
        tower=VisionPlanner.shared(FicocoConfig.parse({"method": "ficoco-v", "keep": 9}), shape),
        num_layers=num_layers,
        token_bytes=10,
        central_square=1.0,
        method="ficoco-vl",
        keep=4,
        most=16,
        methods=(),
        in_decoder=in_decoder,
    )


def image(keep: int = 9, **shape: Any) -> TracedImage:
    return served(**shape).image(Budget("ficoco-v", keep), (300, 200))


def step(site: Any, layer: int, kept: int) -> Step:
    return Step(site, layer, tuple(range(kept)), 0, (), (1.0,) * kept)


def test_kv_bytes_of_a_tower_method_are_those_of_its_prompt() -> None:
    steps = [step("encoder", 3, 10), step("encoder", 4, 6)]
    assert served().visual_tokens(steps, image()) == (6, 6)
    assert served().kv_bytes(20, steps, image()) == 20 * 8 * 10
    assert served(with_cls=True).visual_tokens(steps, image(with_cls=True)) == (7, 7)


def test_kv_bytes_of_a_decoder_method_shrink_from_layer_to_layer() -> None:
    """16 tokens enter; the reducing layer writes all of them, later layers the kept ones."""
    steps = [step("decoder", 1, 10), step("decoder", 5, 4)]
    assert served().visual_tokens(steps, image(16)) == (16, 4)
    tokens = [20, 20, 14, 14, 14, 14, 8, 8]
    assert served().kv_bytes(20, steps, image(16)) == sum(tokens) * 10
    both = [step("encoder", 3, 9), step("decoder", 3, 5)]
    assert served().visual_tokens(both, image()) == (9, 5)
    assert served().kv_bytes(13, both, image()) == (4 * 13 + 4 * 9) * 10


def test_nothing_left() -> None:
    assert served().visual_tokens([], image(16)) == (16, 16)
    assert served().kv_bytes(20, [], image(16)) == 20 * 8 * 10


def test_a_trace_that_others_have_pushed_out_is_noticed() -> None:
    whole = [step("encoder", 3, 9), step("decoder", 3, 5)]
    served().check_complete(whole, image(), 5)
    served().check_complete([], image(16), None)
    served(with_cls=True).check_complete([], image(16, with_cls=True), None)
    served(in_decoder=False).check_complete(whole[:1], image(), 9)
    for part in (whole[:1], whole[1:], []):
        with pytest.raises(ValueError, match="the trace is incomplete: it ends with"):
            served().check_complete(part, image(), 5)


@pytest.mark.parametrize(
    ("size", "crop", "expected"),
    [
        ({"shortest_edge": 192}, True, 1.0),
        ({"shortest_edge": 256}, True, 0.75),
        ({"height": 192}, True, None),
    ],
)
def test_central_square(size: dict[str, int], crop: bool, expected: float | None) -> None:
    processor = SimpleNamespace(size=size, crop_size={"height": 192, "width": 192}, do_center_crop=crop)
    assert central_square(processor) == expected


def test_many_targets_are_summed_up() -> None:
    targets = tuple((token, 0.9 / 30) for token in range(30))
    left = Left.of(Departure(40, targets, 0.1))
    assert len(left.targets) == MAX_TARGETS
    assert left.rest == pytest.approx(0.9 * 14 / 30, abs=1e-4)
    assert left.lost == pytest.approx(0.1)


def test_so_many_in_any_minute() -> None:
    limiter = RateLimiter(3)
    assert [limiter.wait_seconds("a", now) for now in (0.0, 10.0, 20.0)] == [0.0] * 3
    assert limiter.wait_seconds("a", 20.0) == pytest.approx(40.0)
    assert limiter.wait_seconds("b", 20.0) == 0.0
    assert limiter.wait_seconds("a", 59.0) == pytest.approx(1.0)
    assert limiter.wait_seconds("a", 60.0) == 0.0
    assert limiter.wait_seconds("a", 61.0) == pytest.approx(9.0)
    assert [limiter.wait_seconds("a", 1e6) for _ in range(4)] == [0.0] * 3 + [60.0]


def test_the_limit_holds_from_the_first_second() -> None:
    """A client that asks every second gets as many answers as the limit allows, and no more while it continues."""
    limiter = RateLimiter(20)
    admitted = [second for second in range(180) if limiter.wait_seconds("a", float(second)) == 0.0]
    assert len([second for second in admitted if second < 22]) == 20
    for start in range(120):
        assert len([second for second in admitted if start <= second < start + 60]) <= 20


def test_clients_are_forgotten() -> None:
    limiter = RateLimiter(1, max_clients=10)
    for index in range(1000):
        assert limiter.wait_seconds(str(index), 0.0) == 0.0
    assert len(limiter._counted) == 10
    assert limiter.wait_seconds("999", 0.0) > 0.0


def test_no_limit() -> None:
    limiter = RateLimiter(0)
    assert {limiter.wait_seconds("a", 0.0) for _ in range(100)} == {0.0}


def test_a_refusal_says_when_to_come_back() -> None:
    limiter = RateLimiter(1)
    request: Any = SimpleNamespace(client=SimpleNamespace(host="10.0.0.1"))
    limiter.check(request)
    with pytest.raises(HTTPException) as caught:
        limiter.check(request)
    assert caught.value.status_code == 429
    assert caught.value.headers is not None
    assert 50 <= int(caught.value.headers["Retry-After"]) <= 61


def test_keys() -> None:
    assert api_keys(Namespace(api_key=["one", "two"]), "other") == ["one", "two"]
    assert api_keys(Namespace(api_key=None), "other") == ["other"]
    assert api_keys(Namespace(), None) == []
    check_key(Headers({}), [])
    check_key(Headers({"Authorization": "Bearer two"}), ["one", "two"])
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "two"}):
        with pytest.raises(HTTPException) as caught:
            check_key(Headers(headers), ["one", "two"])
        assert caught.value.status_code == 401


def test_off_unless_enabled() -> None:
    app = FastAPI()
    before = len(app.routes)
    app.state.args = Namespace(ficoco_explain=False)
    FicocoEndpoint().attach_router(app)
    assert len(app.routes) == before
    app.state.args = Namespace()  # vLLM's own command line
    FicocoEndpoint().attach_router(app)
    assert len(app.routes) == before
    app.state.args = Namespace(ficoco_explain=True, ficoco_explain_rate=1, api_key=None)
    FicocoEndpoint().attach_router(app)
    assert "/ficoco/explain" in app.openapi()["paths"]


@pytest.mark.parametrize("listed", [None, "", "ficoco", "ficoco,ficoco_endpoint"])
def test_our_routes_are_let_in_and_no_other_plugin_is_shut_out(
    monkeypatch: pytest.MonkeyPatch, listed: str | None
) -> None:
    if listed is None:
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    else:
        monkeypatch.setenv("VLLM_PLUGINS", listed)
    environment.enable_endpoint_plugin(environment.ENDPOINT_PLUGIN)
    names = os.environ["VLLM_PLUGINS"].split(",")
    assert names.count(environment.ENDPOINT_PLUGIN) == 1
    assert ("ficoco" in names) == (listed != "")
    if listed is None:
        assert "lora_filesystem_resolver" in names  # vLLM's own


def explanation(lost: bool = False) -> Explanation:
    """4 x 4 patches, the first of which is merged into the last."""
    side = Measured(
        answer="two\nlines",
        method="ficoco-v",
        visual_tokens=15,
        last_visual_tokens=15,
        prompt_tokens=30,
        completion_tokens=2,
        ttft_seconds=0.5,
        total_seconds=1.0,
        kv_bytes=1000,
    )
    left = Left(token=0, targets=[] if lost else [(15, 1.0)], rest=0.0, lost=float(lost))
    layer = Layer(
        site="encoder", layer=3, kept=list(range(1, 16)), num_fused=0, left=[left], sizes=[1.0] * 14 + [2.0]
    )
    return Explanation(
        model="m",
        question="what " * 200,
        method="ficoco-v",
        keep=15,
        views=[View(first=0, grid=(4, 4), box=(0.0, 0.0, 1.0, 1.0), tile=None)],
        grid=(4, 4),
        central_square=1.0,
        reduced=side,
        full=side,
        layers=[layer],
        destinations=[left],
    )


def colours(picture: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in picture.getcolors(2**24)}  # type: ignore[misc]


def test_the_picture_boxes_what_left_and_where_it_went() -> None:
    picture = draw(Image.new("RGB", (64, 64), (250, 240, 10)), explanation())
    assert picture.width == 1120
    assert RED in colours(picture)
    assert GREEN in colours(picture)
    dropped = draw(Image.new("RGB", (64, 64), (250, 240, 10)), explanation(lost=True), patches=[0])
    assert RED in colours(dropped)
    assert GREEN not in colours(dropped)
    with pytest.raises(ValueError, match="patch = 16 is not allowed; allowed: 0 to 15"):
        draw(Image.new("RGB", (64, 64)), explanation(), patches=[16])


def test_the_picture_counts_the_kept_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    text = ImageDraw.ImageDraw.text

    def write(pen: Any, place: Any, words: str, *more: Any) -> None:
        written.append(words)
        text(pen, place, words, *more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", write)
    draw(Image.new("RGB", (64, 64)), explanation())
    assert [words for words in written if words.startswith("kept")] == ["kept: 15 of 16 patches"]
    assert "tower 4: 15 kept" in written


def test_only_what_left_is_followed() -> None:
    for lost, chosen in ((False, [0]), (True, [])):
        (panel,) = panels(Image.new("RGB", (64, 64)), explanation(lost))
        assert examples(panel, explanation(lost)) == chosen


def test_the_part_that_the_model_sees() -> None:
    picture = Image.new("RGB", (300, 100), WHITE)
    picture.paste((0, 0, 255), (100, 0, 200, 100))
    for square, size, seen in (
        (1.0, (100, 100), {(0, 0, 255)}),
        (0.5, (50, 50), {(0, 0, 255)}),
        (None, (300, 100), None),
    ):
        traced = replace(served(), central_square=square).image(Budget("ficoco-v", 9), (100, 300))
        panel = Panel.of(picture, traced.views)
        assert panel.image.size == size
        assert seen is None or colours(panel.image) == seen
        width, height = size
        assert next(panel.boxes(0))[:2] == (0, 0)
        assert next(panel.boxes(15))[2:] == (width - 1, height - 1)
        assert list(panel.boxes(16)) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["none.png", "?", "--out", "out.png"], "none.png cannot be read as an image"),
        (["text.png", "?", "--out", "out.png"], "text.png cannot be read as an image"),
        (["image.png", "?", "--out", "out.exe"], "--out = 'out.exe' is not allowed; allowed: a name in .png"),
        (["image.png", "?", "--out", "none/out.png"], "there is no folder"),
        (
            ["image.png", "?", "--out", "out.png", "--url", "ftp://host"],
            "--url = 'ftp://host' is not allowed",
        ),
        (["image.png", "?", "--out", "out.png", "--url", "http://x", "--model", "m"], "--model is allowed"),
    ],
)
def test_the_command_s_own_errors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("image.png")
    Path("text.png").write_text("no image")
    assert main(["explain", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("ficoco-vllm: error: ")
    assert part in printed.err
    assert printed.err.count("\n") == 1
    assert not Path("out.png").exists()


def test_the_command_reports_a_missing_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    arguments = [str(tmp_path / "image.png"), "?", "--out", str(tmp_path / "out.png")]
    assert main(["explain", *arguments, "--url", "http://127.0.0.1:9"]) == 1
    assert "no answer from http://127.0.0.1:9" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "accuracy", "--methods", "tome", "--count", "1"],
        ["bench", "load", "--served-model-name", "named", "--requests", "2"],
        ["calibrate", "--data", "log.jsonl", "--methods", "tome", "--target-agreement", "0.5"],
        ["replay", "--data", "log.jsonl", "--method", "tome"],
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_benchmarks_report_a_missing_server(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client of the benchmarks would try again for seconds, and not name the URL."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("image.png")
    lines = [json.dumps({"image": "image.png", "prompt": f"question {number}?"}) for number in range(64)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert main([*words, "--url", "http://127.0.0.1:9/v1", "--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().err
    assert printed.splitlines()[-1].startswith("ficoco-vllm: error: no answer from http://127.0.0.1:9 (")
    assert "starting" not in printed


def test_a_client_that_leaves_early() -> None:
    """The work stops, and nothing is raised for a response that nobody receives."""
    cancelled = []

    class Slow:
        async def explain(self, request: Any, raw_request: Any) -> Explanation:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(request.question)
                raise
            return explanation()

    app = FastAPI()
    explainer: Any = Slow
    routes.attach(app, Namespace(ficoco_explain_rate=0, api_key=None), explainer)
    body = json.dumps({"image": "data:,", "question": "what?"}).encode()
    arriving = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(0.01)
        return arriving.pop(0) if arriving else await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/ficoco/explain",
        "raw_path": b"/ficoco/explain",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    asyncio.run(app(scope, receive, send))
    assert [message["status"] for message in sent if "status" in message] == [499]
    assert cancelled == ["what?"]


def test_every_method_has_its_line() -> None:
    lines = {name: get(name).summary for name in available()}
    lines |= {name: pipeline.summary for name, pipeline in PIPELINES.items()}
    assert {name for name, line in lines.items() if not line} == set()
    of_third_party = replace(get("topk-cls"), summary="")
    assert choice(of_third_party, "features").summary == "Reduces tokens once, after the vision tower."
