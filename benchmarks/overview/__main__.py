"""`make figures`: write the generated blocks and pictures from benchmarks/results/; `--check` writes nothing."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.overview.pictures import pictures
from ficoco_vllm.benchmarks.overview.rows import Results
from ficoco_vllm.benchmarks.overview.tables import blocks

# Resolved: the package may reach this file through a link.
ROOT = Path(__file__).resolve().parents[2]
README, PAGE, IMAGES = ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("accuracy", "accuracy-decoder", "ttft", "load", "concurrency")
# Page to the blocks that it holds.
BLOCKS = {README: ("savings", "accuracy"), PAGE: ("ttft", "load", "machines")}


def committed() -> dict[str, Any]:
    """The committed results, by the names of their files."""
    return {name: json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in NAMES}


def filled(text: str, generated: dict[str, list[str]]) -> str:
    """A page with new lines between its markers.

    Args:
        text: page as it is; everything outside of the blocks stays.
        generated: name of each block to its lines.

    Raises:
        ValueError: the page does not have exactly one block of each name.
    """
    for name, lines in generated.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        content = "".join(f"{line}\n" for line in lines)
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text, count = pattern.subn(f"{begin}{content}{end}", text)
        if count != 1:
            raise ValueError(f"{count} blocks named {name}; needed: one, from {begin.strip()} to {end}")
    return text


def files(pages: dict[Path, str], results: Results) -> dict[Path, str]:
    """Every generated file with its content.

    Args:
        pages: text of each page of `BLOCKS` as it is.
        results: name of each benchmark to its committed JSON.
    """
    generated = blocks(results)
    texts = {page: filled(pages[page], {name: generated[name] for name in BLOCKS[page]}) for page in BLOCKS}
    return texts | {IMAGES / name: svg for name, svg in pictures(results).items()}


def main() -> int:
    """Write the files, or with `--check` only name those that would change.

    Returns:
        1 if one would change.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 on a difference")
    args = parser.parse_args()
    pages = {page: page.read_text(encoding="utf-8") for page in BLOCKS}
    changed = {
        path: text
        for path, text in files(pages, committed()).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in changed.items():
        if args.check:
            print(f"{path.relative_to(ROOT)} differs from the results; `make figures` writes it")
        else:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
