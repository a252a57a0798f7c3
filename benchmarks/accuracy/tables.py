"""Tables of docs/accuracy.md, from the JSON: `python -m ficoco_vllm.benchmarks.accuracy.tables [--check]`."""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.accuracy.paper import ABLATIONS
from ficoco_vllm.benchmarks.accuracy.suites import TABLES
from ficoco_vllm.benchmarks.accuracy.variants import FULL, NO_IMAGE
from ficoco_vllm.benchmarks.harness.results import RESULTS as RESULTS_FOLDER
from ficoco_vllm.benchmarks.harness.results import read

PAGE = Path(__file__).resolve().parents[2] / "docs" / "accuracy.md"
# Two runs, since methods of the decoder take far longer without a GPU; the prefix marks the blocks of the second.
RESULTS = {"": "accuracy", "decoder-": "accuracy-decoder"}
_BLOCK = re.compile(r"(<!-- begin ([a-z-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)

_NAMES = ("kinds", "provenance", *TABLES)

Result = Mapping[str, Any]


def methods_table(result: Result) -> list[str]:
    """Accuracy of every method at every budget, with the difference to all visual tokens."""
    rows = _rows(result, "methods")
    keeps = sorted({row["keep"] for row in rows if row["keep"] is not None}, reverse=True)
    lines = _head(["method", "site", *(f"{keep} tokens" for keep in keeps)])
    for row in rows:
        if row["label"] in (FULL, NO_IMAGE):
            lines.append(
                _line([f"*{row['label']}*", row["site"], f"{row['accuracy']:.1f}", *[""] * (len(keeps) - 1)])
            )
    majority = [result["majority"][kind] for kind in rows[0]["kinds"]] if rows else []
    if majority:
        lines.append(
            _line(["*majority*", "", f"{sum(majority) / len(majority):.1f}", *[""] * (len(keeps) - 1)])
        )
    for method in dict.fromkeys(row["method"] for row in rows if row["method"]):
        cells = {row["keep"]: _with_change(row) for row in rows if row["method"] == method}
        site = next(row["site"] for row in rows if row["method"] == method)
        lines.append(_line([f"`{method}`", site, *(cells.get(keep, "") for keep in keeps)]))
    return lines


def kinds_table(result: Result) -> list[str]:
    """Accuracy of every method at its smallest budget, each type of question alone."""
    rows = _rows(result, "methods")
    if not rows:
        return []
    kinds = list(rows[0]["kinds"])
    smallest = min((row["keep"] for row in rows if row["keep"] is not None), default=None)
    lines = _head([f"method, {smallest} tokens", *(kind.replace("_", " ") for kind in kinds)])
    lines.append(_line(["*majority*", *(f"{result['majority'][kind]:.0f}" for kind in kinds)]))
    for row in rows:
        if row["keep"] in (None, smallest):
            name = f"`{row['label']}`" if row["method"] else f"*{row['label']}, {row['site']}*"
            cells = [_interval(row["kinds"][kind]) for kind in kinds]
            lines.append(_line([name, *cells]))
    return lines


def paired_table(result: Result, table: str) -> list[str]:
    """An ablation or a sensitivity table: difference to the table's first reduced row, with the paper's figures."""
    rows = [row for row in _rows(result, table) if row["label"] != FULL]
    full = [row for row in _rows(result, table) if row["label"] == FULL]
    if not rows:
        return []
    kinds = list(rows[0]["kinds"])
    paper = ABLATIONS.get(table, {})
    extra = ["the paper: SQA", "TextVQA"] if paper else []
    lines = _head(["", "mean", *(kind.replace("_", " ") for kind in kinds), *extra])
    for row in [*full, *rows]:
        cells = [_with_change(row), *(f"{row['kinds'][kind]['accuracy']:.0f}" for kind in kinds)]
        lines.append(_line([row["label"], *cells, *_paper_cells(paper, row["label"])]))
    return lines


def provenance(result: Result) -> list[str]:
    """The command, the machine and the versions."""
    machine = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    counts = {row["table"]: sum(k["count"] for k in row["kinds"].values()) for row in result["rows"]}
    questions = "; ".join(f"{table}: {count}" for table, count in counts.items())
    return [
        f"Questions a row: {questions}. Model `{result['model']}`, seed {result['seed']}, greedy; "
        f"{machine['cores']} cores of an {machine['cpu']}, no GPU; {versions}."
    ]


def composition_table(result: Result) -> list[str]:
    """`best` against other methods on questions that the search for it did not use."""
    rows = result["test"]
    others = [name for name in dict.fromkeys(row["against"] for row in rows) if name != FULL]
    lines = _head(["tokens", "`best`", *(f"against `{name}`" for name in others)])
    for keep in dict.fromkeys(row["keep"] for row in rows):
        figures = {row["against"]: row["accuracy"] for row in rows if row["keep"] == keep}
        cells = [_against(figures[name]) if name in figures else "" for name in others]
        best = next(iter(figures.values()))["after"]
        lines.append(_line([str(keep or "mean of the first four"), f"{100 * best:.1f}", *cells]))
    return lines


def render(result: Result) -> dict[str, list[str]]:
    """Every block of the page by its name."""
    tables = dict.fromkeys(row["table"] for row in result["rows"] if row["table"] != "methods")
    blocks = {
        "methods": methods_table(result),
        "kinds": kinds_table(result),
        "provenance": provenance(result),
    }
    return {**blocks, **{table: paired_table(result, table) for table in tables}}


def filled(page: str, results: Mapping[str, Result], composition: Result | None = None) -> str:
    """A page with current blocks.

    Args:
        page: Markdown with `<!-- begin NAME -->` and `<!-- end NAME -->` lines.
        results: prefix of block names to the result that fills them; where one of `RESULTS` is missing, its blocks
            say so.
        composition: result of the search for `best`.

    Raises:
        ValueError: a block of the page is in no result.
    """
    missing = RESULTS.keys() - results.keys()
    blocks = {prefix + name: ["Not measured yet."] for prefix in missing for name in _NAMES}
    blocks["composition"] = composition_table(composition) if composition else ["Not measured yet."]
    blocks |= {
        prefix + name: lines for prefix, result in results.items() for name, lines in render(result).items()
    }

    def replace(match: re.Match[str]) -> str:
        if match[2] not in blocks:
            raise ValueError(f"block = {match[2]!r} is not in the result; allowed: {', '.join(blocks)}")
        return match[1] + "".join(f"{line}\n" for line in blocks[match[2]]) + match[3]

    return _BLOCK.sub(replace, page)


def _rows(result: Result, table: str) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if row["table"] == table]


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _with_change(row: Mapping[str, Any]) -> str:
    against = row.get("against_full")
    if against is None:
        return f"{row['accuracy']:.1f}"
    low, high = against["interval"]
    return f"{row['accuracy']:.1f} ({against['change']:+.1f}: {low:+.1f} to {high:+.1f})"


def _against(figures: Mapping[str, Any]) -> str:
    low, high = (100 * end for end in figures["interval"])
    return f"{100 * figures['before']:.1f} ({100 * figures['change']:+.1f}: {low:+.1f} to {high:+.1f})"


def _interval(kind: Mapping[str, Any]) -> str:
    low, high = kind["interval"]
    return f"{kind['accuracy']:.0f} ({low:.0f}-{high:.0f})"


def _paper_cells(paper: Mapping[str, tuple[float | None, float | None]], label: str) -> list[str]:
    if not paper:
        return []
    return ["" if value is None else f"{value:.2f}" for value in paper.get(label, (None, None))]


def committed() -> dict[str, Any]:
    """The committed results, by the prefix of their blocks."""
    return {
        prefix: read(name) for prefix, name in RESULTS.items() if (RESULTS_FOLDER / f"{name}.json").exists()
    }


def main() -> int:
    """Write the page, or with `--check` only say whether that would change it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit status 1 if the page would change"
    )
    args = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    new = filled(page, committed(), read("composition"))
    if args.check:
        return int(new != page)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
