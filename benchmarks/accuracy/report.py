"""The report of an accuracy run: page, CSV, terminal, bars."""

from collections.abc import Mapping, Sequence
from typing import Any

from ficoco_vllm.benchmarks.accuracy.plots import plots
from ficoco_vllm.benchmarks.accuracy.tables import methods_table, of_table, questions, tables
from ficoco_vllm.benchmarks.harness.report import Page, Section, Table, facts
from ficoco_vllm.benchmarks.harness.results import Bar, at_most, csv_text

Result = Mapping[str, Any]
_TITLES = {
    "methods": "Methods by budget",
    "kinds": "By type of question",
    "ablation": "Ablation",
    "exchange": "Stages exchanged",
    "sensitivity": "Sensitivity to settings",
}
_NAMES = {"v": "FiCoCo-V", "l": "FiCoCo-L"}
_COLUMNS = ("table", "label", "site", "method", "keep", "questions", "accuracy")
_AGAINST = ("change", "change_low", "change_high", "agreement")


def page(result: Result) -> Page:
    """The report of a result."""
    rows = of_table(result, "methods")
    sections = []
    for table in tables(result):
        kind, _, method = table.name.partition("-")
        title = _TITLES[kind] + (f", {_NAMES[method]}" if method else "")
        pictures = plots(rows, result["num_tokens"]) if table.name == "methods" else []
        sections.append(Section(title, tables=[table], plots=pictures))
    return Page(
        title="Accuracy by method and budget",
        lead=_lead(rows),
        warnings=result["warnings"],
        sections=sections,
        facts=facts(
            result["environment"],
            model=result["model"],
            questions=f"{result['workload']} benchmark, seed {result['seed']}; a row: {questions(result)}",
            decoding="greedy; an answer counts if it is exactly right",
        ),
    )


def summary(result: Result) -> list[Table]:
    """Tables for the terminal."""
    return [methods_table(result)] if of_table(result, "methods") else tables(result)


def as_csv(result: Result) -> str:
    """Every row: its figures, and the percentage of each type of question."""
    kinds = dict.fromkeys(kind for row in result["rows"] for kind in row["kinds"])
    lines = []
    for row in result["rows"]:
        against = row.get("against_full", {})
        interval = zip(("change_low", "change_high"), against.get("interval", ()), strict=False)
        count = sum(kind["count"] for kind in row["kinds"].values())
        shares = {name: figures["accuracy"] for name, figures in row["kinds"].items()}
        lines.append({**row, "questions": count, **against, **dict(interval), **shares})
    return csv_text((*_COLUMNS, *_AGAINST, *kinds), lines)


def bars(result: Result, regressed: Sequence[str] | None) -> list[Bar]:
    """Limits of a run; `regressed` is None without a reference to compare with."""
    limits = [at_most("accuracy-rows-that-are-not-reduced-as-requested", len(result["warnings"]))]
    if regressed is not None:
        limits.append(at_most("accuracy-rows-worse-than-the-reference", len(regressed)))
    return limits


def _lead(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The methods that lose least and most at the smallest budget."""
    compared = [row for row in rows if row["method"] and "against_full" in row]
    if not compared:
        return []
    smallest = min(row["keep"] for row in compared)
    shown = [row for row in compared if row["keep"] == smallest]
    order = sorted(shown, key=lambda row: -row["against_full"]["change"])
    words = ", ".join(f"`{row['method']}` {row['against_full']['change']:+.1f}" for row in order)
    return [f"Change at {smallest} visual tokens, in percentage points: {words}."]
