"""`replay` and `make bench-quality` in miniature, and bars that fail when they should."""

import json
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.benchmarks.accuracy.client import Endpoint
from ficoco_vllm.benchmarks.accuracy.workload import embedded
from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.benchmarks.quality.__main__ import bars, compared
from ficoco_vllm.benchmarks.quality.replay import parts
from ficoco_vllm.benchmarks.quality.traffic import reference, send
from ficoco_vllm.quality.settings import QualitySettings
from ficoco_vllm.quality.simulation import Recorded, Replayed
from ficoco_vllm.server.cli import main
from tests.support.server import API_KEY, DEMO_KEEP, Server

LADDER = (64, 192, 576)
EASY, HARD = "colour", "number_by_colour_3"


def write_log(folder: Path, count: int) -> Path:
    """Questions of two classes of traffic, in turns."""
    lines = []
    pairs = zip(*(embedded((kind,), count, seed=3) for kind in (EASY, HARD)), strict=True)
    for item in (item for pair in pairs for item in pair):
        (folder / f"{item.name}.png").write_bytes(item.image or b"")
        line = {"image": f"{item.name}.png", "prompt": item.question, "class": item.kind}
        lines.append(json.dumps(line))
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "log.jsonl"


@pytest.mark.server
def test_a_log_is_replayed(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count, repeat = 10, 40
    command = ["replay", "--data", str(write_log(tmp_path, count)), "--target-agreement", "0.8"]
    command += ["--method", "tome", "--repeat", str(repeat), "--url", server.url, "--api-key", API_KEY]
    quality = {"ladder": LADDER, "share": 1.0, "max_extra": 1.0, "max_tokens_per_minute": 10**9}
    assert main([*command, "--quality", json.dumps(quality), "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "replay.json").read_text())
    assert report["requests"] == 2 * count * repeat
    assert report["settled"][EASY] == 64, "colours survive in few tokens"
    assert report["settled"][HARD] > 64, "three small numbers do not"
    assert report["agreement"] >= 0.8
    assert 0 < report["compared"] <= report["requests"]
    assert 64 < report["visual_tokens"] < 576
    assert [row["to"] - row["from"] for row in report["parts"]] == [80] * 10
    assert {move["traffic"] for move in report["moves"]} >= {EASY}
    printed = capsys.readouterr().out
    assert f"{report['compared']} were answered a second time" in printed
    assert f"64 ({EASY})" in printed
    # Once at every budget: the same run again asks nothing.
    known = (tmp_path / "answers.jsonl").read_text()
    assert len(known.splitlines()) == 1 + 2 * count * len(LADDER)
    assert main([*command, "--quality", json.dumps(quality), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "answers.jsonl").read_text() == known


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-agreement", "1.5"], "target_agreement = 1.5 is not allowed"),
        (["--quality", "{"], "--quality = '{' is not valid JSON"),
        (["--quality", "[]"], "--quality = '[]' is not allowed; allowed: a JSON object"),
        (["--quality", '{"ladder": [64, 600]}'], "ladder"),
        (["--quality", '{"laddr": [64]}'], "laddr"),
        (["--repeat", "0"], "--repeat = 0 is not allowed"),
        (["--rate", "0"], "--rate = 0.0 is not allowed"),
        (["--method", "nothing"], "nothing"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert main(["replay", "--data", str(tmp_path), "--prompt", "?", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_parts_of_a_log_cover_it() -> None:
    outcome = Replayed(scores=[1.0] * 5 + [0.0] * 2, keeps=[64] * 5 + [192] * 2)
    rows = parts(outcome, 3)
    assert [(row["from"], row["to"]) for row in rows] == [(0, 2), (2, 4), (4, 7)]
    assert [row["agreement"] for row in rows] == [1.0, 1.0, 0.3333]
    assert rows[-1]["visual_tokens"] == pytest.approx((64 + 2 * 192) / 3, abs=0.1)
    assert len(parts(outcome, 10)) == 7, "fewer requests than parts"


@pytest.mark.server
def test_traffic_is_compared_with_the_full_model(server: Server) -> None:
    items = embedded((EASY, HARD), 4, seed=5)
    endpoint = Endpoint(server.url, "ficoco-demo", 576, API_KEY)
    expected = reference(endpoint, items)
    assert expected.keys() == {item.name for item in items}
    with Task("traffic", 24) as task:
        phase = send(endpoint, items, expected, 24, 0, task)
    assert phase.kept == [DEMO_KEEP] * 24
    assert len(phase.agreeing) == 24
    assert any(phase.agreeing)
    assert phase.num_tokens > 24 * DEMO_KEEP
    with Task("traffic", 8) as task:
        wrong = send(endpoint, items, dict.fromkeys(expected, "?"), 8, 0, task)
    assert not any(wrong.agreeing)


@pytest.mark.parametrize(("agreements", "expected"), [((1.0, 1.0), 64), ((0.9, 1.0), 192), ((0.5, 0.6), 576)])
def test_the_control_law_and_calibrate_find_the_same_budget(
    agreements: tuple[float, float], expected: int
) -> None:
    settings = QualitySettings.parse(
        {"target_agreement": 0.98, "ladder": LADDER, "share": 0.2, "max_tokens_per_minute": 10**7}
    )
    known = [
        Recorded((*(float(number < share * 100) for share in agreements), 1.0), (124, 252, 636), 636)
        for number in range(100)
    ]
    row = compared(settings, known)
    assert (row["settled"], row["calibrated"]) == (expected, expected)
    assert row["agreement_by_budget"] == dict(zip(LADDER, (*agreements, 1.0), strict=True))
    assert row["extra"] <= 0.03


def result(**changes: Any) -> dict[str, Any]:
    """A run in which every bar passes, or some figures of it changed."""
    figures = {"high": 0.95, "agreement": 0.89, "easy": 96, "hard": 400, "again": 128}
    figures |= {"extra": 0.02, "rung": 1, "ratio": 1.02} | changes
    phases = [
        {"visual_tokens_late": figures[name], "agreement": figures["agreement"] if name == "hard" else 1.0}
        for name in ("easy", "hard", "again")
    ]
    return {
        "live": {"high": figures["high"], "requests": 3000, "extra": figures["extra"], "phases": phases},
        "stationary": [{"settled_rung": figures["rung"], "calibrated_rung": 1}],
        "overhead": {"time_ratio": figures["ratio"]},
    }


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, set()),
        ({"high": 0.89}, {"quality-agreement"}),
        # Wilson's interval contains the target of 0.9 for 890 of 1,000 answers that agree, not for 880.
        ({"agreement": 0.88}, {"quality-phase-agreement"}),
        ({"easy": 300}, {"quality-easy-tokens"}),
        ({"easy": 96, "hard": 96}, {"quality-hard-tokens-of-easy", "quality-easy-again-tokens-of-hard"}),
        ({"again": 400}, {"quality-easy-again-tokens-of-hard"}),
        ({"extra": 0.031}, {"quality-extra-tokens"}),
        ({"rung": 2}, {"quality-rungs-from-calibrated"}),
        ({"ratio": 1.2}, {"quality-overhead"}),
    ],
)
def test_each_bar_can_fail(change: dict[str, Any], failing: set[str]) -> None:
    assert {bar.name for bar in bars(result(**change)) if not bar.passed} == failing


def test_the_committed_result_passes() -> None:
    assert all(bar.passed for bar in bars(read("quality")))
