"""The committed pages are what their commands write from the committed figures."""

import subprocess
import sys
from pathlib import Path

import pytest

from ficoco_vllm.benchmarks.accuracy.tables import PAGE, committed, filled, searched

ROOT = Path(__file__).parents[2]


def test_accuracy_page_is_what_the_results_give() -> None:
    page = PAGE.read_text()
    assert filled(page, committed(), searched()) == page
    assert filled(page.replace("ficoco-v", "ficoco-w"), committed(), searched()) != page.replace(
        "ficoco-v", "ficoco-w"
    )


def test_a_block_without_a_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="block = 'ablation-x' is not in the result"):
        filled("<!-- begin ablation-x -->\n<!-- end ablation-x -->\n", committed())


def test_paper_settings_are_current() -> None:
    command = [sys.executable, "-m", "ficoco_vllm.benchmarks.paper_settings", "--check"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
