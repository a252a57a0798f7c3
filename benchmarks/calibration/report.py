"""The report of a calibration: page, CSV, and lines for the terminal."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from ficoco_vllm.benchmarks.accuracy.statistics import wilson
from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import data_url
from ficoco_vllm.benchmarks.harness.plots import COLOURS, Plot, draw
from ficoco_vllm.benchmarks.harness.report import Page, Section, Table, facts, plain
from ficoco_vllm.benchmarks.harness.results import csv_text

Report = Mapping[str, Any]
_COLUMNS = ("method", "part", "keep", "agreeing", "count", "agreement", "at_least", "safe")


def page(report: Report, items: Sequence[Item]) -> Page:
    """The report of `run.calibrate`, with those questions that disagree."""
    by_name = {item.name: item for item in items}
    head, *remarks = _sentences(report)
    return Page(
        title="Calibration",
        lead=[f"{head}.", *remarks],
        sections=[
            Section("Smallest safe budgets", tables=[overview(report)]),
            *(_section(entry, report, by_name) for entry in report["methods"]),
        ],
        facts=facts(report["environment"], model=report["model"]),
    )


def overview(report: Report) -> Table:
    """The smallest safe budget of each method, and what it saves."""
    rows = []
    for entry in report["methods"]:
        cells = ["none", *[""] * 5]
        if safe := entry["safe"]:
            first = safe["first_token"]
            cells = [
                str(safe["keep"]),
                f"{safe['agreement']:.1%}",
                f"{safe['at_least']:.1%}",
                f"{safe['first_token_divergence']:.4f}",
                f"{safe['kv_cache']['saving']:.0%}",
                f"{first['speedup']:.2f}x ({1000 * first['seconds']:.0f} ms)",
            ]
        rows.append([f"`{entry['method']}`", *cells])
    return Table(
        "calibration",
        f"Smallest budget with an agreement of at least {report['target_agreement']:.1%}",
        (
            *("method", "visual tokens", "agreement", "agreement, at least", "first-token divergence"),
            *("KV cache saved", "first token, speed-up"),
        ),
        rows,
        [f"At least: one-sided lower bound with {report['confidence']:.0%} confidence. Divergence in nats."],
    )


def lines(report: Report) -> list[str]:
    """Lines for the terminal: the target, methods without a safe budget, and the commands that serve the others."""
    serve = [f"    {entry['safe']['serve']}" for entry in report["methods"] if entry["safe"]]
    return [*map(plain, _sentences(report)), *serve]


def as_csv(report: Report) -> str:
    """Every budget of each method, in the search and in the certificate."""
    parts = (("search", "searched"), ("certificate", "tested"))
    rows = (
        {"method": entry["method"], "part": part} | test
        for entry in report["methods"]
        for part, key in parts
        for test in entry[key]
    )
    return csv_text(_COLUMNS, rows)


def _sentences(report: Report) -> list[str]:
    """The target, and the methods that miss it or whose server is not deterministic."""
    questions = report["questions"]
    printed = [
        f"{questions['search']} questions searched, {questions['certificate']} fresh ones for the certificate; target "
        f"{report['target_agreement']:.3f} with {report['confidence']:.0%} confidence, for each method alone"
    ]
    for entry in report["methods"]:
        name, with_itself = f"`{entry['method']}`", entry["full_agrees_with_itself"]
        if with_itself < report["target_agreement"]:
            printed.append(
                f"{name}: with all tokens the server agrees with itself in {with_itself:.1%} only, so no budget can be "
                "expected to reach the target."
            )
        if entry["safe"] is None:
            largest = (entry["tested"] or entry["searched"][::-1])[0]
            printed.append(
                f"{name}: no budget is safe; at {largest['keep']} tokens {largest['agreeing']} of {largest['count']} "
                "answers agree."
            )
    return printed


def _section(entry: Mapping[str, Any], report: Report, by_name: Mapping[str, Item]) -> Section:
    safe, worst = entry["safe"], entry["worst"]
    where = f"{entry['worst_keep']} tokens, questions of the {entry['worst_of']}"
    shown = f"Worst disagreements at {where}." if worst else f"No disagreements at {where}."
    if any(row["patches"] is None for row in worst):
        shown += " For the kept patches, start the server with --ficoco-explain."
    return Section(
        entry["method"],
        lines=["To serve this budget:"] if safe else ["No budget is safe."],
        command=safe["serve"] if safe else "",
        warnings=entry["warnings"],
        tables=[_budgets(entry, report["target_agreement"])],
        plots=[_agreement(entry, report["target_agreement"])],
        extra=Markup("<p>{}</p>\n<div class='cases'>\n{}\n</div>").format(
            shown, Markup("\n").join(_case(row, by_name[row["item"]]) for row in worst)
        ),
    )


def _budgets(entry: Mapping[str, Any], target: float) -> Table:
    """Every budget with its answers in the search and in the certificate."""
    tested = {test["keep"]: test for test in entry["tested"]}
    rows = []
    for seen in reversed(entry["searched"]):
        if test := tested.get(seen["keep"]):
            cells = [_counts(test), f"{test['at_least']:.1%}", "safe" if test["safe"] else "not safe"]
        else:
            missed = seen["agreeing"] < target * seen["count"]
            cells = ["", "", "below the target in the search" if missed else "not tested"]
        rows.append([str(seen["keep"]), _counts(seen), *cells])
    return Table(
        f"budgets-{entry['method']}",
        f"Budgets of `{entry['method']}`",
        ("visual tokens", "agree in the search", "agree in the certificate", "at least", "verdict"),
        rows,
        ["Only the certificate, on questions that the search has not seen, shows that a budget is safe."],
    )


def _counts(test: Mapping[str, Any]) -> str:
    return f"{test['agreeing']} of {test['count']}, {test['agreement']:.0%}"


def _agreement(entry: Mapping[str, Any], target: float) -> Plot:
    """Agreement over the budget, with Wilson's intervals, in the search and in the certificate."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        ticks = [test["keep"] for test in entry["searched"]]
        for part, label, colour, shift in (
            ("searched", "search", COLOURS[0], -0.08),
            ("tested", "certificate", COLOURS[4], 0.08),
        ):
            tests = entry[part]
            places = [ticks.index(test["keep"]) + shift for test in tests]
            bounds = [wilson(test["agreeing"], test["count"]) for test in tests]
            lows, highs = [100 * low for low, _ in bounds], [100 * high for _, high in bounds]
            axes.vlines(places, lows, highs, color=colour)
            shares = [100 * test["agreement"] for test in tests]
            axes.plot(places, shares, "o", color=colour, label=label, clip_on=False)
        axes.axhline(100 * target, color="#777777", linestyle=":", label="target")
        axes.set_xticks(range(len(ticks)), map(str, ticks))
        axes.set_xlabel("visual tokens")
        axes.set_ylabel("agreement, %, with 95% interval")
        axes.set_ylim(top=100)
        figure.legend(loc="outside upper left", ncols=3, frameon=False, fontsize=8)

    name = f"agreement-{entry['method']}"
    return draw(name, f"Answers of {entry['method']} that agree with the full model's", (5.6, 3.4), paint)


def _case(row: Mapping[str, Any], item: Item) -> Markup:
    source = data_url(item.image or b"", item.media_type)
    patches = _patches(row["patches"], item, source)
    return Markup(
        "<div class='case'><img alt='' src='{}'>{}<dl><dt>question</dt><dd>{}</dd><dt>all tokens</dt><dd>{}</dd>"
        "<dt>reduced</dt><dd>{}</dd><dt>divergence</dt><dd>at least {:.3f} nats</dd></dl></div>"
    ).format(source, patches, item.question, row["full"], row["reduced"], row["divergence"])


def _patches(explanation: Mapping[str, Any] | None, item: Item, source: str) -> Markup:
    """The image again, with the removed patches darkened."""
    if explanation is None:
        return Markup()
    with Image.open(io.BytesIO(item.image or b"")) as picture:
        width, height = ImageOps.exif_transpose(picture).size
    (rows, columns), square = explanation["grid"], explanation["central_square"]
    wide, high = (width, height) if square is None else (square * min(width, height),) * 2
    left, top, w, h = (width - wide) / 2, (height - high) / 2, wide / columns, high / rows
    gone = sorted(set(range(rows * columns)) - set(explanation["kept"]))
    cells = "".join(
        f"M{left + token % columns * w:.2f} {top + token // columns * h:.2f}h{w:.2f}v{h:.2f}h{-w:.2f}z"
        for token in gone
    )
    return Markup(
        "<svg role=img aria-label='{} patches that were kept' viewBox='0 0 {} {}'>"
        "<image href='{}' width='{}' height='{}'/><path d='{}' fill-opacity='.7'/></svg>"
    ).format(len(explanation["kept"]), width, height, source, width, height, cells)
