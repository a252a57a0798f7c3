"""The committed pages equal those that their commands write from the committed figures."""

import subprocess
import sys
from pathlib import Path

import pytest

from ficoco_vllm.benchmarks.accuracy.tables import PAGE, blocks
from ficoco_vllm.benchmarks.harness.pages import fill
from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.schedule import default_start_layer

ROOT = Path(__file__).parents[2]


def test_accuracy_page_is_what_the_results_give() -> None:
    page = PAGE.read_text()
    assert fill(page, blocks()) == page
    changed = page.replace("ficoco-v", "ficoco-w")
    assert fill(changed, blocks()) != changed


def test_a_block_without_a_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="'ablation-x'"):
        fill(PAGE.read_text() + "<!-- begin ablation-x -->\n<!-- end ablation-x -->\n", blocks())


def test_paper_settings_are_current() -> None:
    command = [sys.executable, "-m", "ficoco_vllm.benchmarks.paper_settings", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_best_is_the_committed_winner_of_the_search() -> None:
    """It beats FiCoCo-V at each budget of the paper, and no other method beats it, on questions outside the search."""
    result = read("composition")
    winner = result["winner"]
    stages = {kind: winner["settings"][kind] for kind in ("filter", "correlate", "compress")}
    best, searched = get("best"), get(winner["method"]).configure(**stages).method
    assert (best.site, best.default_schedule) == (searched.site, winner["settings"]["schedule"])
    assert winner["settings"]["start_layer"] == default_start_layer(8)  # of the demo model's layers
    for kind in stages:
        assert getattr(best, kind) is getattr(searched, kind)
    assert {row["keep"] for row in result["test"] if row["against"] == "ficoco-v"} >= {288, 192, 128, 64}
    for row in result["test"]:
        low, high = row["accuracy"]["interval"]
        if row["against"] == "ficoco-v":
            assert low > 0, row
        elif row["against"] != "full":
            assert high >= 0, row
