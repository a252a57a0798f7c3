"""The README's table and pictures: what stands in them, and that they are those of the committed results."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ficoco_vllm.benchmarks.load.settings import Traffic
from ficoco_vllm.benchmarks.overview.__main__ import README, committed, files
from ficoco_vllm.benchmarks.overview.pictures import pictures
from ficoco_vllm.benchmarks.overview.settings import Setting, collect
from ficoco_vllm.benchmarks.overview.table import markdown

ROOT = Path(__file__).parents[2]


@pytest.fixture
def results() -> dict[str, Any]:
    """The committed results, to be changed."""
    return copy.deepcopy(committed())


def test_committed_files_are_what_the_results_give() -> None:
    """Regenerating changes nothing."""
    command = [sys.executable, "-m", "ficoco_vllm.benchmarks.overview", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_another_figure_changes_table_and_picture(results: dict[str, Any]) -> None:
    readme = README.read_text()
    results["ttft"]["runs"][0]["kinds"]["keep-64"]["speedup"] = 9.87
    changed = files(readme, results)
    assert "9.87x" in changed[README]
    assert {path.name for path, text in changed.items() if path.read_text() != text} == {
        "README.md",
        "serving.svg",
    }


def test_what_was_not_measured_is_left_out(results: dict[str, Any]) -> None:
    del results["concurrency"]
    results.pop("load", None)
    text = "\n".join(markdown(results))
    assert "at once" not in text
    assert "requests/s" not in text
    del results["ttft"]["runs"][0]["kinds"]["keep-192"], results["ttft"]["whole_model"]["keep-192"]
    assert "FiCoCo-V 192" not in "\n".join(markdown(results))
    del results["accuracy"]
    results.pop("accuracy-decoder", None)
    assert "accuracy, demo model" not in "\n".join(markdown(results))


def test_measurements_of_one_setting_meet_in_one_row(results: dict[str, Any]) -> None:
    small = collect(results)[Setting("ficoco-v", 64)]
    assert small.accuracy is not None
    assert small.accuracy["prompt_tokens"] < 100
    assert small.ttft is not None
    assert small.ttft["num_prompt_tokens"] == 124
    assert small.concurrency is not None
    assert small.concurrency["mean_kv_tokens"] == 124.0
    assert Setting("ficoco-l", 64, "one-shot").label == "FiCoCo-L 64, one-shot"
    # docs/decoder-kv.md: 379.6 tokens a layer on average, 32 layers of 2 * 4096 * 2 bytes a token.
    assert Setting("ficoco-l", 64).kv_megabytes() == pytest.approx(379.625 * 32 * 16384 / 1e6, abs=0.1)


def test_load_stands_beside_at_its_largest_point(results: dict[str, Any]) -> None:
    servers = [
        {"name": "stock", "method": None, "keep": None},
        {"name": "tome-64", "method": "tome", "keep": 64},
    ]
    rows = [
        {"point": f"concurrency {number}", "traffic": Traffic(concurrency=number).model_dump()}
        for number in (4, 16)
    ]
    summary = [
        {"server": server["name"], "point": row["point"]}
        | dict.fromkeys(("request_throughput", "request_throughput_min", "request_throughput_max"), value)
        for row, value in zip(rows, (1.25, 2.5), strict=True)
        for server in servers
    ]
    machine = {**results["ttft"]["environment"], "cores": 64}
    results["load"] = {
        "servers": servers,
        "rows": rows,
        "summary": summary,
        "model": "a model",
        "num_rounds": 2,
        "environment": machine,
    }
    text = "\n".join(markdown(results))
    (row,) = [line for line in text.splitlines() if line.startswith("| `tome` 64")]
    assert "2.50 (2.50-2.50)" in row
    assert "1.25" not in text
    assert "16 open requests" in text
    assert "`make bench-load` on 64 cores" in text


def test_pictures_are_the_same_each_time(results: dict[str, Any]) -> None:
    drawn = pictures(results)
    assert drawn == pictures(results)
    words = "".join(ElementTree.fromstring(drawn["accuracy.svg"]).itertext())
    assert {"ficoco-v", "tome", "divprune"} <= set(words.split())


def test_a_readme_without_a_place_is_an_error(results: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has 0 blocks"):
        files("# nothing\n", results)
