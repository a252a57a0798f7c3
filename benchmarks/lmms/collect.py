"""Results of several runs beside the paper's figures."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ficoco_vllm.benchmarks.harness.pages import table as markdown_table
from ficoco_vllm.benchmarks.lmms.benchmarks import BENCHMARKS


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Results of a folder that `bench lmms` wrote into, in the order of the paper's columns."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    order = list(BENCHMARKS)
    return sorted(
        rows, key=lambda row: order.index(row["benchmark"]) if row["benchmark"] in order else len(order)
    )


def table(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each run: what was measured, what the paper prints."""
    lines = []
    for row in results:
        title = BENCHMARKS[row["benchmark"]].title if row["benchmark"] in BENCHMARKS else row["benchmark"]
        paper = "" if row["paper"] is None else f"{row['paper']:.1f}"
        cells = [title, Path(row["model"]).name, row["method"] or "none", row["keep"] or "all", row["count"]]
        lines.append([*cells, f"{row['measured']:.1f}", paper, row["note"]])
    head = ("benchmark", "model", "method", "tokens", "questions", "measured", "the paper", "note")
    return markdown_table(head, lines)
