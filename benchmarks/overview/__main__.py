"""`make figures`: write the generated blocks and pictures from benchmarks/results/; `--check` writes nothing."""

import sys
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, write_pages
from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.benchmarks.overview.pictures import pictures
from ficoco_vllm.benchmarks.overview.tables import FAMILIES, Results, blocks

README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
NAMES = ("accuracy", "accuracy-decoder", "ttft", "load", "concurrency", *FAMILIES)
# Page to the blocks that it holds.
BLOCKS = {README: ("savings", "accuracy", "advice"), PAGE: ("ttft", "families", "load", "machines")}


def committed() -> dict[str, Any]:
    """The committed results, by the names of their files."""
    return {name: read(name) for name in NAMES}


def files(results: Results) -> dict[Path, str]:
    """Every generated file with its content."""
    generated = blocks(results)
    pages = {
        page: fill(page.read_text(encoding="utf-8"), {name: generated[name] for name in names})
        for page, names in BLOCKS.items()
    }
    return pages | {IMAGES / name: svg for name, svg in pictures(results).items()}


def main() -> int:
    """Write the files, or check them."""
    return write_pages(__doc__, lambda: files(committed()))


if __name__ == "__main__":
    sys.exit(main())
