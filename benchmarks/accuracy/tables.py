"""Tables of a run, and those of docs/accuracy.md: `python -m ficoco_vllm.benchmarks.accuracy.tables [--check]`."""

import sys
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ficoco_vllm.benchmarks.accuracy.paper import ABLATIONS
from ficoco_vllm.benchmarks.accuracy.variants import FULL, NO_IMAGE
from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, write_pages
from ficoco_vllm.benchmarks.harness.report import Table
from ficoco_vllm.benchmarks.harness.results import read

PAGE = ROOT / "docs" / "accuracy.md"
# Two runs, since methods of the decoder take far longer without a GPU; the prefix marks the blocks of the second.
RESULTS = {"": "accuracy", "decoder-": "accuracy-decoder"}
CHANGE = (
    "In brackets: change against all visual tokens on the same questions in percentage points, with the 95% interval "
    "of a paired bootstrap."
)
Result = Mapping[str, Any]


def methods_table(result: Result) -> Table:
    """Accuracy of every method at every budget, with the difference to all visual tokens."""
    rows = of_table(result, "methods")
    keeps = sorted({row["keep"] for row in rows if row["keep"] is not None}, reverse=True)
    blank = [""] * len(keeps)
    lines = [
        [f"*{row['label']}*", row["site"], f"{row['accuracy']:.1f}", *blank]
        for row in rows
        if row["label"] in (FULL, NO_IMAGE)
    ]
    majority = fmean(result["majority"][kind] for kind in rows[0]["kinds"])
    lines.append(["*majority*", "", f"{majority:.1f}", *blank])
    for method in dict.fromkeys(row["method"] for row in rows if row["method"]):
        mine = [row for row in rows if row["method"] == method]
        cells = {row["keep"]: _with_change(row) for row in mine}
        lines.append([f"`{method}`", mine[0]["site"], "", *(cells.get(keep, "") for keep in keeps)])
    header = ["method", "site", "no budget", *(f"{keep} tokens" for keep in keeps)]
    return Table("methods", "Correct answers, %, by visual tokens per image", header, lines, [CHANGE])


def kinds_table(result: Result) -> Table:
    """Accuracy of every method at its smallest budget, each type of question alone."""
    rows = of_table(result, "methods")
    kinds = list(rows[0]["kinds"])
    smallest = min((row["keep"] for row in rows if row["keep"] is not None), default=None)
    lines = [["*majority*", *(f"{result['majority'][kind]:.0f}" for kind in kinds)]]
    for row in rows:
        if row["keep"] in (None, smallest):
            name = f"`{row['label']}`" if row["method"] else f"*{row['label']}, {row['site']}*"
            lines.append([name, *(_interval(row["kinds"][kind]) for kind in kinds)])
    header = [f"method, {smallest} tokens", *(kind.replace("_", " ") for kind in kinds)]
    note = "In brackets: Wilson's 95% interval."
    return Table("kinds", "Correct answers, %, by type of question", header, lines, [note])


def paired_table(result: Result, name: str) -> Table:
    """An ablation, exchange or sensitivity table, with the paper's figures where it has such a table."""
    rows = sorted(of_table(result, name), key=lambda row: row["label"] != FULL)
    kinds = list(rows[0]["kinds"])
    paper = ABLATIONS.get(name)
    lines = []
    for row in rows:
        cells = [_with_change(row), *(f"{row['kinds'][kind]['accuracy']:.0f}" for kind in kinds)]
        if paper:
            cells += [f"{value:.2f}" for value in paper.get(row["label"], ())] or ["", ""]
        lines.append([row["label"], *cells])
    extra = ["the paper: SQA", "TextVQA"] if paper else []
    header = ["", "mean", *(kind.replace("_", " ") for kind in kinds), *extra]
    return Table(name, f"Correct answers, %: {name}", header, lines, [CHANGE])


def provenance(result: Result) -> str:
    """The questions, the machine and the versions."""
    machine = result["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    dtype = result.get("dtype")  # older results have none
    model = f"`{result['model']}`" + (f" in {dtype}" if dtype else "")
    return (
        f"Questions a row: {questions(result)}. Model {model}, seed {result['seed']}, greedy; "
        f"{machine['cores']} cores of an {machine['cpu']}, no GPU; {versions}."
    )


def questions(result: Result) -> str:
    """Questions a row, by table."""
    counts = {row["table"]: sum(k["count"] for k in row["kinds"].values()) for row in result["rows"]}
    return "; ".join(f"{table}: {count}" for table, count in counts.items())


def composition_table(result: Result) -> Table:
    """`best` against other methods on questions that the search for it did not use."""
    rows = result["test"]
    others = [name for name in dict.fromkeys(row["against"] for row in rows) if name != FULL]
    lines = []
    for keep in dict.fromkeys(row["keep"] for row in rows):
        figures = {row["against"]: row["accuracy"] for row in rows if row["keep"] == keep}
        cells = [_compared(fig["before"], fig, 100) if (fig := figures.get(name)) else "" for name in others]
        best = next(iter(figures.values()))["after"]
        lines.append([str(keep or "mean of the first four"), f"{100 * best:.1f}", *cells])
    header = ["tokens", "`best`", *(f"against `{name}`" for name in others)]
    return Table("composition", "The preset `best`", header, lines)


def tables(result: Result) -> list[Table]:
    """Every table of a run."""
    names = list(dict.fromkeys(row["table"] for row in result["rows"]))
    compared = [methods_table(result), kinds_table(result)] if "methods" in names else []
    return compared + [paired_table(result, name) for name in names if name != "methods"]


def blocks() -> dict[str, list[str]]:
    """Every block of the page by its name, from the committed results."""
    lines = {"composition": composition_table(read("composition")).markdown()}
    for prefix, name in RESULTS.items():
        result = read(name)
        lines[f"{prefix}provenance"] = [provenance(result)]
        lines |= {prefix + table.name: table.markdown() for table in tables(result)}
    return lines


def of_table(result: Result, table: str) -> list[Mapping[str, Any]]:
    """Rows of one table."""
    return [row for row in result["rows"] if row["table"] == table]


def _with_change(row: Mapping[str, Any]) -> str:
    against = row.get("against_full")
    return f"{row['accuracy']:.1f}" if against is None else _compared(row["accuracy"], against)


def _compared(value: float, against: Mapping[str, Any], scale: float = 1) -> str:
    change, low, high = (scale * figure for figure in (against["change"], *against["interval"]))
    return f"{scale * value:.1f} ({change:+.1f}: {low:+.1f} to {high:+.1f})"


def _interval(kind: Mapping[str, Any]) -> str:
    low, high = kind["interval"]
    return f"{kind['accuracy']:.0f} ({low:.0f}-{high:.0f})"


if __name__ == "__main__":
    sys.exit(write_pages(__doc__, lambda: {PAGE: fill(PAGE.read_text(encoding="utf-8"), blocks())}))
