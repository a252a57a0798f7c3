"""`calibrate` on the demo model: an easy and a hard workload get different budgets, and the promise holds."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ficoco_vllm.benchmarks.accuracy.client import Endpoint, pairs, replay
from ficoco_vllm.benchmarks.accuracy.store import Store
from ficoco_vllm.benchmarks.accuracy.variants import Variant, full
from ficoco_vllm.benchmarks.accuracy.workload import Item, embedded
from ficoco_vllm.benchmarks.calibration.data import read_items
from ficoco_vllm.benchmarks.calibration.effects import divergence, kv_saving, visual_tokens_of_layers
from ficoco_vllm.benchmarks.calibration.report import page
from ficoco_vllm.server.cli import main
from ficoco_vllm.server.commands.plan import read_config
from tests.support.server import API_KEY, Server

TARGET, LOW_TARGET = 0.9, 0.6
METHOD = "tome"
# Large shapes survive in few tokens; one of three small numbers does not.
EASY, HARD = ("colour", "shape"), ("number_by_colour_3",)
COUNT = 56
SAFE = {
    "keep": 3,
    "agreement": 1.0,
    "at_least": 0.9,
    "first_token_divergence": 0.0,
    "kv_cache": {"saving": 0.5},
    "first_token": {"speedup": 2.0, "seconds": 0.1},
    "serve": "ficoco-vllm serve",
}


def _write(folder: Path, kinds: tuple[str, ...], seed: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for item in embedded(kinds, COUNT // len(kinds), seed):
        (folder / f"{item.name}.png").write_bytes(item.image or b"")
        lines.append(json.dumps({"image": f"{item.name}.png", "prompt": item.question}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "data.jsonl"


def _calibrate(
    server: Server, folder: Path, kinds: tuple[str, ...], target: float = TARGET, *options: str
) -> tuple[int, dict[str, Any]]:
    """Exit status and report of the command."""
    data = _write(folder, kinds, seed=11)
    command = ["calibrate", "--data", str(data), "--target-agreement", str(target), "--methods", METHOD]
    command += ["--url", server.url, "--api-key", API_KEY, "--out", str(folder), *options]
    status = main([*command, "--budgets", "288,192,128,96,64,48"])
    return status, dict(json.loads((folder / "calibration.json").read_text()))


@pytest.fixture(scope="module")
def reports(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The reports of both workloads, and the folders they lie in."""
    result = {}
    for name, kinds in (("easy", EASY), ("hard", HARD)):
        folder = tmp_path_factory.mktemp(name)
        status, report = _calibrate(server, folder, kinds)
        assert status == 0
        result[name] = {**report, "folder": folder}
    return result


@pytest.mark.long
@pytest.mark.server
def test_easy_and_hard_workloads_get_different_budgets(reports: dict[str, dict[str, Any]]) -> None:
    safe = {name: report["methods"][0]["safe"] for name, report in reports.items()}
    assert safe["easy"]["keep"] < safe["hard"]["keep"]
    for figures in safe.values():
        assert figures["at_least"] >= TARGET
        assert figures["kv_cache"]["saving"] > 0.3
        assert figures["first_token"]["seconds"] > 0
        assert figures["serve"].endswith(f"--ficoco-method {METHOD} --ficoco-keep {figures['keep']}")


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize(("name", "kinds"), [("easy", EASY), ("hard", HARD)])
def test_the_promise_holds_on_fresh_data(
    server: Server, reports: dict[str, dict[str, Any]], name: str, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    safe = reports[name]["methods"][0]["safe"]
    items = embedded(kinds, COUNT // len(kinds), seed=12)
    variant = Variant(METHOD, "tower", METHOD, safe["keep"])
    endpoint = Endpoint(server.url, "ficoco-demo", 576, API_KEY)
    with Store(tmp_path / "fresh.jsonl", {}) as store:
        replay(endpoint, pairs([full("tower"), variant], items), store, 16, name)
        agreeing = sum(
            store[full("tower").key, item.name].text == store[variant.key, item.name].text for item in items
        )
    assert agreeing / len(items) >= TARGET


@pytest.mark.long
@pytest.mark.server
def test_report_shows_the_worst_disagreements(
    server: Server, reports: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    """Under a target so low that the budget which reaches it is one of disagreements."""
    known = str(reports["hard"]["folder"] / "answers.jsonl")
    status, report = _calibrate(server, tmp_path, HARD, LOW_TARGET, "--answers", known)
    assert status == 0
    (entry,) = report["methods"]
    shown = (tmp_path / "calibration.html").read_text()
    assert entry["safe"]["keep"] < reports["hard"]["methods"][0]["safe"]["keep"]
    tested = {test["keep"]: test for test in entry["tested"]}[entry["safe"]["keep"]]
    assert len(entry["worst"]) == min(12, tested["count"] - tested["agreeing"])
    assert shown.count("class='case'") == shown.count("<svg role=img") == len(entry["worst"])
    assert entry["worst"], "without a disagreement nothing is shown"
    for row in entry["worst"]:
        assert len(row["patches"]["kept"]) == entry["safe"]["keep"]
        # Traced in a separate chat, which hits no cache: the same answer.
        assert row["patches"]["answer"] == row["reduced"]
    assert [row["divergence"] for row in entry["worst"]] == sorted(
        (row["divergence"] for row in entry["worst"]), reverse=True
    )
    assert entry["safe"]["serve"] in shown


def test_darkened_patches_lie_where_they_were() -> None:
    """A grid of 2 x 2 over the central square of an image of 40 x 20: patch 3 is its lower right quarter."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "PNG")
    worst = {"item": "a", "full": "1", "reduced": "2", "divergence": 0.5}
    reported = {"answer": "2", "grid": [2, 2], "central_square": 1.0, "kept": [0, 1, 2]}
    seen = {"keep": 3, "agreeing": 1, "count": 1, "agreement": 1.0}
    tests = {"searched": [seen], "tested": [seen | {"at_least": 0.9, "safe": True}]}
    entry = {"method": METHOD, "full_agrees_with_itself": 1.0, "warnings": [], "safe": SAFE, **tests}
    shown = [{**worst, "patches": reported}, {**worst, "patches": None}]
    report = {
        "questions": {"search": 1, "certificate": 1},
        "target_agreement": 0.9,
        "confidence": 0.95,
        "model": "m",
        "environment": {"cpu": "c", "cores": 2, "versions": {}},
        "methods": [{**entry, "worst": shown, "worst_keep": 3, "worst_of": "certificate"}],
    }
    rendered = page(report, [Item("a", "own", "<?>", buffer.getvalue())]).html()
    assert "<path d='M20.00 10.00h10.00v10.00h-10.00z'" in rendered
    assert rendered.count("patches that were kept") == 1
    assert rendered.count("start the server with --ficoco-explain") == 1
    assert "<dd>&lt;?&gt;</dd>" in rendered


@pytest.mark.long
@pytest.mark.server
@pytest.mark.parametrize(
    ("change", "warned"),
    [({"keep": 576}, True), ({"method": "random"}, False)],
    ids=["a server that secretly does not reduce", "a method that drops at random"],
)
def test_planted_regressions_are_noticed(
    server: Server,
    reports: dict[str, dict[str, Any]],
    tampered: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    warned: bool,
) -> None:
    """Not reducing shows in the prompts; dropping at random costs a larger budget, or leaves none."""
    tampered.append(change)
    status, report = _calibrate(server, tmp_path, HARD)
    entry = report["methods"][0]
    if warned:
        assert status == 1
        assert "the server does not reduce" in capsys.readouterr().err
        assert entry["warnings"]
    else:
        assert entry["warnings"] == []
        honest = reports["hard"]["methods"][0]["safe"]["keep"]
        assert entry["safe"] is None or entry["safe"]["keep"] > honest


def test_folder_and_lines_give_the_same_questions(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "b.txt").write_text("one?\n\ntwo?\n")
    result = read_items(tmp_path, "what is it?")
    assert [(item.question, item.media_type) for item in result] == [
        ("what is it?", "image/jpeg"),
        ("one?", "image/png"),
        ("two?", "image/png"),
    ]
    lines = tmp_path / "data.jsonl"
    lines.write_text('{"image": "b.png", "prompt": "one?"}\n\n{"image": "a.JPG"}\n')
    assert [(item.question, item.image) for item in read_items(lines, "what?")] == [
        ("one?", b"b.png"),
        ("what?", b"a.JPG"),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: image is missing"),
        ('{"image": "a.png"}', "line 1: prompt = None is not allowed"),
        ('{"image": "a.txt", "prompt": "?"}', r"image = 'a\.txt' is not allowed; allowed: \.png"),
        ('{"image": "a.png", "prompt": "?"}', r"image = '.*a\.png' cannot be read"),
    ],
)
def test_bad_data_is_named_by_its_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_items(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-agreement", "1.5"], "target_agreement = 1.5 is not allowed"),
        (["--budgets", "600"], "budgets = 600 is not allowed; allowed: 1 to 575"),
        (["--methods", "nothing"], "nothing"),
        (["--target-agreement", "0.98"], "too few to show an agreement of 0.98"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["calibrate", "--data", str(tmp_path), "--prompt", "?", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_divergence_is_exact_for_whole_distributions_and_a_lower_bound_for_parts() -> None:
    import math

    full_model = {"a": math.log(0.7), "b": math.log(0.2), "c": math.log(0.1)}
    reduced = {"a": math.log(0.5), "b": math.log(0.1), "c": math.log(0.4)}
    exact = sum(math.exp(p) * (p - reduced[token]) for token, p in full_model.items())
    assert divergence(full_model, reduced) == pytest.approx(exact)
    parts = ({"a": full_model["a"]}, {"a": reduced["a"], "c": reduced["c"]})
    assert 0 < divergence(*parts) < exact
    assert divergence(full_model, full_model) == 0.0


def test_kv_cache_by_the_layers_that_hold_it() -> None:
    config = read_config("llava-hf/llava-1.5-7b-hf")
    tower = kv_saving(config, Variant("v", "tower", "ficoco-v", 64), 576, 60)
    # The paper's Table 8: 333.4 MB and 65.0 MB.
    assert (round(tower["full_bytes"] / 1e6, 1), round(tower["bytes"] / 1e6, 1)) == (333.4, 65.0)
    # docs/decoder-kv.md: eight segments of four layers.
    layers = visual_tokens_of_layers(Variant("l", "decoder", "ficoco-l", 64), 32, 576)
    assert layers[::4] == [576, 502, 429, 356, 283, 210, 137, 64]
    assert visual_tokens_of_layers(Variant("vl", "both", "ficoco-vl", 64), 32, 576)[0] == 192
