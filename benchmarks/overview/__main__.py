"""`make figures`: write the README's table and pictures out of benchmarks/results/; `--check` writes nothing."""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.overview.pictures import pictures
from ficoco_vllm.benchmarks.overview.table import markdown

ROOT = Path(__file__).resolve().parents[2]
README, IMAGES = ROOT / "README.md", ROOT / "docs" / "images"
RESULTS = ROOT / "benchmarks" / "results"
NAMES = ("accuracy", "accuracy-decoder", "ttft", "load", "concurrency")
_BLOCK = re.compile(r"(<!-- begin results -->\n).*?(<!-- end results -->)", re.DOTALL)


def committed() -> dict[str, Any]:
    """The committed results that there are, by the names of their files."""
    paths = {name: RESULTS / f"{name}.json" for name in NAMES}
    return {
        name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()
    }


def files(readme: str, results: dict[str, Any]) -> dict[Path, str]:
    """Every file that is made of the results, with its content.

    Args:
        readme: the README as it is; what is outside of its block stays.
        results: name of each benchmark to its committed JSON.

    Raises:
        ValueError: the README has no block for the table.
    """
    table = "".join(f"{line}\n" for line in markdown(results))
    filled, count = _BLOCK.subn(lambda match: f"{match[1]}{table}{match[2]}", readme)
    if count != 1:
        raise ValueError(
            f"README.md has {count} blocks of results; needed: one, <!-- begin results --> to <!-- end"
        )
    return {README: filled, **{IMAGES / name: svg for name, svg in pictures(results).items()}}


def main() -> int:
    """Write the files, or with `--check` only say which of them would change.

    Returns:
        1 if one would change.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if a file would change"
    )
    args = parser.parse_args()
    changed = {
        path: text
        for path, text in files(README.read_text(encoding="utf-8"), committed()).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    }
    for path, text in changed.items():
        if args.check:
            print(f"{path.relative_to(ROOT)} is not what the results give; `make figures` writes it")
        else:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
