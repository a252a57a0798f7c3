"""Generated tables and pictures: their content, and that the committed ones are those of the committed results."""

import copy
import subprocess
import sys
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

import pytest

from ficoco_vllm.benchmarks.harness.pages import ROOT, fill
from ficoco_vllm.benchmarks.load.settings import Traffic
from ficoco_vllm.benchmarks.overview.__main__ import BLOCKS, PAGE, README, committed, files
from ficoco_vllm.benchmarks.overview.pictures import pictures
from ficoco_vllm.benchmarks.overview.tables import FICOCO_L, FICOCO_V, STOCK, load, machines


@pytest.fixture
def results() -> dict[str, Any]:
    """A copy of the committed results."""
    return copy.deepcopy(committed())


def test_regenerating_changes_nothing() -> None:
    command = [sys.executable, "-m", "ficoco_vllm.benchmarks.overview", "--check"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_another_figure_changes_tables_and_picture(results: dict[str, Any]) -> None:
    results["ttft"]["runs"][0]["kinds"]["keep-64"]["speedup"] = 9.87
    changed = files(results)
    assert "0.9 s (9.9x faster)" in changed[README]
    assert "9.87x" in changed[PAGE]
    different = {path.name for path, text in changed.items() if path.read_text() != text}
    assert different == {"README.md", "benchmarks.md", "serving.svg"}


def test_kv_cache_of_a_request(results: dict[str, Any]) -> None:
    """By hand: tokens a layer x 32 layers x (keys and values) x 4,096 x 2 bytes."""
    for row, tokens in ((STOCK, 636.0), (FICOCO_V, 124.0), (FICOCO_L, 379.625)):
        assert row.kv_megabytes(results) == pytest.approx(tokens * 32 * 2 * 4096 * 2 / 1e6)
    del results["ttft"]["runs"][0]["kinds"]["keep-64"]["num_prompt_tokens"]  # not needed where it was counted
    assert FICOCO_V.kv_megabytes(results) == pytest.approx(65.0, abs=0.05)


def test_every_cell_of_the_readme_is_filled(results: dict[str, Any]) -> None:
    for generate in BLOCKS[README].values():
        header, _, *rows = [line for line in generate(results) if line.startswith("|")]
        for row in rows:
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert len(cells) == len(header.strip("|").split("|"))
            assert all(cells)


def test_load_is_that_of_the_largest_point(results: dict[str, Any]) -> None:
    names = ("stock", "tome-64")
    rows = [
        {"point": f"concurrency {number}", "traffic": asdict(Traffic(concurrency=number))}
        for number in (4, 16)
    ]
    figures = ("request_throughput", "request_throughput_min", "request_throughput_max")
    summary = [
        {"server": name, "point": row["point"], "ttft_ms_p50": 1000.0} | dict.fromkeys(figures, value)
        for row, value in zip(rows, (1.25, 2.5), strict=True)
        for name in names
    ]
    machine = {**results["ttft"]["environment"], "cores": 64}
    results["load"] = {"rows": rows, "summary": summary, "environment": machine}
    lines = load(results)
    assert "| tome-64 | 2.50 (2.50-2.50) | 1.0 s |" in lines
    assert len(lines) == 4
    assert any(line.startswith("`make bench-load`: 64 cores") for line in machines(results))


def test_pictures_are_the_same_each_time(results: dict[str, Any]) -> None:
    rendered = pictures(results)
    assert rendered == pictures(results)
    words = "".join(ElementTree.fromstring(rendered["accuracy.svg"]).itertext())
    assert {"ficoco-v", "tome", "divprune"} <= set(words.split())


def test_a_page_without_the_block_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"blocks \[\]; needed: \['savings'\]"):
        fill("# nothing\n", {"savings": ["text"]})
