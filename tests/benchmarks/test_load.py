"""The load test: order, arithmetic, report, and a miniature run against real servers."""

import csv
import json
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ficoco_vllm.benchmarks.harness.report import save
from ficoco_vllm.benchmarks.harness.terminal import Task
from ficoco_vllm.benchmarks.load.client import decoding_together, latencies, write_dataset
from ficoco_vllm.benchmarks.load.report import page, tables
from ficoco_vllm.benchmarks.load.run import run_turn, run_turns
from ficoco_vllm.benchmarks.load.sampling import read_figures
from ficoco_vllm.benchmarks.load.settings import Server, Target, Traffic, Turn, make_turns
from ficoco_vllm.benchmarks.load.summary import FIGURES, as_csv, check, ratio, summarise
from ficoco_vllm.server.cli import main
from tests.support.answering import answering
from tests.support.server import API_KEY
from tests.support.server import Server as RunningServer

METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.75
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0",model_name="m"} 4.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.7e9
# TYPE vllm:prompt_tokens counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 700.0
# TYPE vllm:request_success counter
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 6.0
vllm:request_success_total{engine="1",finished_reason="length",model_name="m"} 1.0
# TYPE ficoco:kv_tokens_avoided counter
ficoco:kv_tokens_avoided_total{engine="0",model_name="m",method="tome",segment="0"} 5.0
ficoco:kv_tokens_avoided_total{engine="0",model_name="m",method="tome",segment="1"} 7.0
ficoco:kv_tokens_avoided_total{engine="0",model_name="m",method="off",segment="0"} 0.0
"""


def row(server: str, round_index: int, throughput: float, point: str = "concurrency 4") -> dict[str, Any]:
    """A row of a run, its other figures made up."""
    figures: dict[str, Any] = dict.fromkeys(FIGURES, 10.0)
    figures |= {f"{name}_ms_p{p}": float(p) for name in ("ttft", "itl", "tpot", "e2el") for p in (50, 90, 99)}
    samples = [{"seconds": t, "kv_cache_usage": t / 10, "num_running": t} for t in range(3)]
    return {
        "server": server,
        "round": round_index,
        "point": point,
        "seed": 1,
        "traffic": asdict(Traffic(concurrency=4)),
        "completed": 4,
        "duration": 1.0,
        "num_prompt_tokens": 4 * 640.0 if server == "stock" else 4 * 128.0,
        "reduced_by": [] if server == "stock" else ["tome"],
        **figures,
        "request_throughput": throughput,
        "samples": samples,
    }


ROWS = [row("stock", 0, 2.0), row("tome-64", 0, 5.0), row("tome-64", 1, 3.0), row("stock", 1, 1.0)]


def test_every_server_gets_every_point_with_the_same_seed_in_every_round() -> None:
    servers = [Server(name="a"), Server(name="b", method="tome"), Server(name="c", method="evit")]
    points = [Traffic(rate=1.0), Traffic(rate=2.5), Traffic(concurrency=8)]
    turns = make_turns(servers, points, 4, seed=3)
    assert turns == make_turns(servers, points, 4, seed=3)
    seeds = []
    for number in range(4):
        mine = [turn for turn in turns if turn.round_index == number]
        assert {turn.server.name for turn in mine} == {"a", "b", "c"}
        assert len({frozenset(turn.points) for turn in mine}) == 1
        seeds += [seed for _, seed in mine[0].points]
    assert len(set(seeds)) == 12  # no image is seen twice
    assert len({tuple(turn.server.name for turn in turns if turn.round_index == n) for n in range(4)}) > 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("magic", "'magic' is not known"), ("tome:0", "an integer from 1"), ("tome:x", "an integer from 1")],
)
def test_servers_that_are_not_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Server.parse(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rates", "inf"], "rate = inf"),
        (["--rates", "-1"], "rate = -1.0"),
        (["--concurrency", "0"], "concurrency = 0"),
        (["--concurrency"], "--rates and --concurrency are both empty"),
        (["--requests", "1"], "num_requests = 1"),
        (["--rounds", "0"], "--rounds = 0"),
        (["--servers", "stock", "stock"], "names one twice"),
    ],
)
def test_options_that_are_not_allowed(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert load(tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_a_rate_is_a_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        load(tmp_path, "--rates", "fast")
    assert "--rates: invalid float value: 'fast'" in capsys.readouterr().err


def load(out: Path, *options: str) -> int:
    """Run the command."""
    return main(["bench", "load", "--out", str(out), *options])


def test_metrics_of_several_engines() -> None:
    assert read_figures(METRICS) == {
        "num_running": 5.0,
        "num_waiting": 1.0,
        "num_preemptions": 4.0,
        "num_prompt_tokens": 700.0,
        "num_finished": 7.0,
        "kv_cache_usage": 0.75,
        "avoided": {"tome": 12.0, "off": 0.0},
    }
    assert read_figures("# nothing of vLLM's\n") == {}


def test_summary_and_ratio_are_taken_round_by_round() -> None:
    summary = summarise(ROWS)
    assert [(row["server"], row["request_throughput"]) for row in summary] == [
        ("stock", 1.5),
        ("tome-64", 4.0),
    ]
    assert (summary[0]["request_throughput_min"], summary[0]["request_throughput_max"]) == (1.0, 2.0)
    # 5/2 and 3/1: pairs within a round, not the ratio of the medians.
    assert ratio(ROWS, "request_throughput", "tome-64", "stock", "concurrency 4") == 2.75
    silent = [{**row, "num_running_max": None} for row in ROWS]
    assert summarise(silent)[0]["num_running_max"] is None
    assert "-" in tables(silent, summarise(silent))[1].rows[0]


def test_csv_holds_every_row() -> None:
    read = list(csv.DictReader(StringIO(as_csv(ROWS))))
    assert [line["request_throughput"] for line in read] == ["2.0", "5.0", "3.0", "1.0"]
    assert "samples" not in read[0]


def test_report_draws_every_picture_the_same_each_time(tmp_path: Path) -> None:
    other = [{**line, "point": "concurrency 16", "traffic": asdict(Traffic(concurrency=16))} for line in ROWS]
    result: dict[str, Any] = {
        "model": "<demo>",
        "environment": {"cpu": "c", "cores": 2, "versions": {"torch": "2"}},
        "command": "ficoco-vllm bench load",
        "seed": 0,
        "num_rounds": 2,
        "warnings": ["tome-64: <doubt>"],
        "summary": summarise([*ROWS, *other]),
        "rows": [*ROWS, *other],
    }
    assert [line["point"] for line in result["summary"]] == ["concurrency 4"] * 2 + ["concurrency 16"] * 2
    html = page(result).html()
    assert html == page(result).html()
    assert "&lt;demo&gt;" in html
    assert "tome-64: &lt;doubt&gt;" in html
    assert html.count("2.75x") == 3  # a row of each point, and the lead
    pictures = html.split("<svg")[1:]
    assert len(pictures) == 6
    line = save(page(result), result, as_csv(result["rows"]), tmp_path, "load")
    files = {path.name for path in tmp_path.iterdir()}
    assert {"load.json", "load.html", "load.csv", "load.tex"} <= files
    assert len([name for name in files if name.endswith(".svg")]) == 6
    assert all(name in line for name in files)
    assert r"\texttt{tome-64}" in (tmp_path / "load.tex").read_text()
    for picture in pictures:
        svg = ElementTree.fromstring("<svg" + picture[: picture.index("</svg>")] + "</svg>")
        words = "".join(svg.itertext())
        assert "stock" in words
        assert "tome-64" in words


def test_requests_that_decode_together_are_counted_from_the_clients_times() -> None:
    """Four at a time; /metrics, read twice a second, may see one of them only."""
    measured = {
        "start_times": [0.0, 0.0, 0.0, 0.0, 0.3],
        "ttfts": [0.1, 0.1, 0.15, 0.2, 0.1],
        "latencies": [0.3, 0.25, 0.25, 0.3, 0.3],
        "output_lens": [3, 1, 2, 2, 2],
        "itls": [[0.1, 0.1], [], [0.1], [0.1], [0.2]],
    }
    assert decoding_together(measured) == 4
    figures = latencies(measured)
    assert figures["tpot"] == pytest.approx([0.1, 0.1, 0.1, 0.2])
    assert figures["itl"] == [0.1, 0.1, 0.1, 0.1, 0.2]


SERVERS = [Server.parse("stock"), Server.parse("tome:64")]


@pytest.mark.parametrize(
    ("name", "change", "doubt"),
    [
        ("tome-64", {}, None),
        ("tome-64", {"reduced_by": []}, "reduces by nothing, not by tome"),
        ("tome-64", {"reduced_by": ["random"]}, "reduces by random, not by tome"),
        ("tome-64", {"num_prompt_tokens": 4 * 640.0}, "shorter than stock vLLM's by 0 tokens, not by 512"),
        ("stock", {"reduced_by": ["tome"]}, "stock vLLM reduces by tome"),
        ("tome-64", {"num_prompt_tokens": None, "reduced_by": []}, None),  # a server without /metrics
    ],
)
def test_a_server_that_does_something_else_is_doubted(
    name: str, change: dict[str, Any], doubt: str | None
) -> None:
    rows = [measured | (change if measured["server"] == name else {}) for measured in ROWS]
    matches = check(rows, SERVERS, 576)
    assert len(matches) == (doubt is not None)
    assert doubt is None or doubt in matches[0]


def test_a_decoder_method_that_takes_all_blocks_is_doubted() -> None:
    servers = [Server.parse("stock"), Server.parse("fastv:64")]
    ours = row("fastv-64", 0, 1.0) | {"num_prompt_tokens": 4 * 640.0, "reduced_by": ["fastv"]}
    assert not check([ROWS[0], ours], servers, 576)
    assert "reduces by nothing" in check([ROWS[0], ours | {"reduced_by": []}], servers, 576)[0]


@pytest.mark.server
def test_a_server_of_another_method_or_budget_is_noticed(server: RunningServer, tmp_path: Path) -> None:
    """The server that the tests share runs FiCoCo-V with 64 tokens; its tokenizer is not at hand."""
    target = Target("", "ficoco-demo", None, (), tmp_path, API_KEY)
    traffic = Traffic(concurrency=2, num_requests=2, num_answer_tokens=2)
    for text, doubt in (("ficoco-v:64", None), ("random:64", "reduces by ficoco-v, not by random")):
        requested = Server.parse(text)
        with Task("requests", 6) as task:
            rows = run_turn(Turn(0, requested, ((traffic, 1),)), server.url, target, task)
        assert task.done == 6
        matches = check(rows, [requested], 576)
        assert matches == ([] if doubt is None else [f"{requested.name}, concurrency 2: the server {doubt}"])
        # The server's own tokenizer has set the length: template, image and text.
        assert rows[0]["num_prompt_tokens"] / 2 == pytest.approx(64 + traffic.num_text_tokens, abs=16)


def test_prompts_without_a_tokenizer(tmp_path: Path) -> None:
    """A server that does not tokenize gets as many words; all prompts and images differ, and a seed repeats them."""
    traffic = Traffic(concurrency=2, num_requests=3, num_text_tokens=7, image_side=8)
    target = Target("", "m", None, (), tmp_path)
    with answering([], {}) as (url, _):
        texts = [write_dataset(tmp_path, url, target, traffic, seed).read_text() for seed in (1, 1, 2)]
    assert texts[0] == texts[1]
    rows = [json.loads(line) for text in texts[1:] for line in text.splitlines()]
    assert {len(row["prompt"].split()) for row in rows} == {7}
    assert len({row["image_files"][0] for row in rows}) == 6


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.server
def test_miniature_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stock vLLM, without our plugin, and ours: all requests answered, the shorter prompt seen in the KV cache."""
    # Answers long enough that several requests decode together: with short ones the looks at /metrics may all fall
    # where the front end reads images and one request or none is in the engine.
    status = load(
        tmp_path,
        *("--servers", "stock", "ficoco-v:9", "--concurrency", "4", "--requests", "12"),
        *("--answer-tokens", "96", "--rounds", "1", "--bar", "0.01", "--bar-token", "100"),
        *("--sample-seconds", "0.02"),
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert "BAR load-throughput-ficoco-v-9-over-stock" in printed
    assert "BAR load-token-ficoco-v-9-over-stock" in printed
    result = json.loads((tmp_path / "load.json").read_text())
    stock, ours = sorted(result["rows"], key=lambda row: row["server"], reverse=True)
    assert (stock["server"], ours["server"]) == ("stock", "ficoco-v-9")
    for measured in (stock, ours):
        assert measured["completed"] == 12
        assert measured["total_output_tokens"] == 12 * 96
        assert 0 < measured["ttft_ms_p50"] <= measured["ttft_ms_p99"] <= measured["e2el_ms_p99"]
        assert measured["num_running_max"] >= 1
    assert 0 < ours["kv_cache_usage_max"] < 0.5 * stock["kv_cache_usage_max"]
    assert result["warnings"] == []
    servers = [Server.parse("stock"), Server.parse("ficoco-v:9")]
    # A server that silently does not reduce would have the measurements of stock vLLM.
    secretly_off = {**stock, "server": "ficoco-v-9"}
    assert "reduces by nothing" in check([stock, secretly_off], servers, 576)[0]
    pretending = {**secretly_off, "reduced_by": ["ficoco-v"]}
    assert "by 0 tokens, not by 567" in check([stock, pretending], servers, 576)[0]
    assert "BAR load-servers-that-do-not-reduce-as-configured 0 0 PASS" in printed
    assert (tmp_path / "load.html").read_text().startswith("<!doctype html>")
    assert r"\texttt{ficoco-v-9}" in (tmp_path / "load.tex").read_text()
    with pytest.raises(RuntimeError, match="did not start"):
        load_broken(tmp_path)


def load_broken(out: Path) -> None:
    """A server that cannot start is an error with the end of its log."""
    turns = make_turns([Server(name="stock")], [Traffic(concurrency=1)], 1, 0)
    target = Target(str(out / "nothing"), "m", str(out), (), out)
    run_turns(turns, target)
