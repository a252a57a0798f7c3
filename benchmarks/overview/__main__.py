"""`make figures`: write the generated blocks and pictures from benchmarks/results/; `--check` writes nothing."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, write_pages
from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.benchmarks.overview import tables
from ficoco_vllm.benchmarks.overview.pictures import pictures

README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
NAMES = ("accuracy", "accuracy-decoder", "ttft", "load", "concurrency", *tables.FAMILIES)
# Page to the blocks that it holds, by the names in their markers.
BLOCKS: dict[Path, dict[str, Callable[[tables.Results], list[str]]]] = {
    README: {"savings": tables.savings, "accuracy": tables.accuracy, "advice": tables.advice},
    PAGE: {
        "ttft": tables.ttft,
        "families": tables.families,
        "load": tables.load,
        "machines": tables.machines,
    },
}


def committed() -> dict[str, Any]:
    """The committed results, by the names of their files."""
    return {name: read(name) for name in NAMES}


def files(results: tables.Results) -> dict[Path, str]:
    """Every generated file with its content."""
    pages = {
        page: fill(page.read_text(encoding="utf-8"), {name: lines(results) for name, lines in blocks.items()})
        for page, blocks in BLOCKS.items()
    }
    return pages | {IMAGES / name: svg for name, svg in pictures(results).items()}


if __name__ == "__main__":
    sys.exit(write_pages(__doc__, lambda: files(committed())))
