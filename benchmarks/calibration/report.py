"""The calibration report: a page that needs nothing else, and lines for the terminal."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image, ImageOps

from ficoco_vllm.benchmarks.accuracy.workload import Item
from ficoco_vllm.benchmarks.harness.http import data_url

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { padding: .7rem; overflow-x: auto; background: color-mix(in srgb, currentColor 8%, transparent); }
figure { display: grid; grid-template-columns: 9rem 9rem 1fr; gap: 1rem; margin: 1rem 0; }
img, svg { width: 9rem; }
dl { margin: 0; display: grid; grid-template-columns: max-content 1fr; gap: .2rem .8rem; }
dt { opacity: .7; } dd { margin: 0; }
"""

Report = Mapping[str, Any]


def lines(report: Report) -> list[str]:
    """The outcome for the terminal."""
    questions = report["questions"]
    printed = [
        f"{questions['search']} questions searched, {questions['certificate']} fresh ones for the certificate; target "
        f"{report['target_agreement']:.3f} with {report['confidence']:.0%} confidence, for each method alone"
    ]
    for entry in report["methods"]:
        printed += ["", *_of_method(entry, report["target_agreement"])]
    return printed


def _of_method(entry: Mapping[str, Any], target: float) -> list[str]:
    name, safe = entry["method"], entry["safe"]
    printed = [f"WARNING {line}" for line in entry["warnings"]]
    if entry["full_agrees_with_itself"] < target:
        printed.append(
            f"{name}: with all tokens the server agrees with itself in {entry['full_agrees_with_itself']:.1%} only, "
            "so no budget can be expected to reach the target"
        )
    if safe is None:
        tried = ", ".join(
            f"{test['keep']}: {test['agreeing']} of {test['count']}"
            for test in entry["tested"] or entry["searched"]
        )
        return [*printed, f"{name}: no budget is safe ({tried})"]
    cache, first = safe["kv_cache"], safe["first_token"][name]
    return [
        *printed,
        f"{name}: {safe['keep']} tokens agree in {safe['agreement']:.1%} (at least {safe['at_least']:.1%}); "
        f"KV cache of a prompt {cache['saving']:.0%} smaller; first token {first['speedup']:.2f}x as fast, "
        f"{1000 * first['seconds']:.0f} ms",
        f"    {safe['serve']}",
    ]


def page(report: Report, items: Sequence[Item]) -> str:
    """A self-contained HTML page."""
    by_name = {item.name: item for item in items}
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Calibration</title><style>{_STYLE}</style><h1>Calibration</h1>",
        f"<p>{escape(lines(report)[0])}. Model {escape(str(report['model']))}.</p>",
        _table(report),
    ]
    for entry in report["methods"]:
        parts.append(f"<h2>{escape(entry['method'])}</h2>")
        parts += [f"<p><strong>{escape(line)}</strong></p>" for line in entry["warnings"]]
        if entry["safe"] is None:
            parts.append(f"<p>{escape(' '.join(_of_method(entry, report['target_agreement'])))}</p>")
            continue
        parts.append(f"<pre>{escape(entry['safe']['serve'])}</pre>")
        worst = entry["worst"]
        parts.append(f"<p>Worst disagreements on fresh questions: {len(worst) or 'none'}.</p>")
        parts += [_figure(row, by_name[row["item"]]) for row in worst]
    return "\n".join(parts) + "\n"


def _table(report: Report) -> str:
    head = ("method", "tokens", "agreement", "at least", "divergence", "KV cache saved", "first token")
    rows = ["<tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr>"]
    for entry in report["methods"]:
        safe = entry["safe"]
        cells = ["none", *[""] * 5]
        if safe is not None:
            cells = [
                str(safe["keep"]),
                f"{safe['agreement']:.1%}",
                f"{safe['at_least']:.1%}",
                f"{safe['first_token_divergence']['mean']:.4f}",
                f"{safe['kv_cache']['saving']:.0%}",
                f"{safe['first_token'][entry['method']]['speedup']:.2f}x",
            ]
        rows.append(
            f"<tr><td>{escape(entry['method'])}</td>"
            + "".join(f"<td class=number>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return f"<table>{''.join(rows)}</table>"


def _figure(row: Mapping[str, Any], item: Item) -> str:
    source = data_url(item.image or b"", item.media_type)
    return (
        f"<figure><img alt='' src='{source}'>{_patches(row['patches'], item, source)}<dl>"
        f"<dt>question</dt><dd>{escape(item.question)}</dd>"
        f"<dt>all tokens</dt><dd>{escape(row['full'])}</dd>"
        f"<dt>reduced</dt><dd>{escape(row['reduced'])}</dd>"
        f"<dt>divergence</dt><dd>{row['divergence']:.3f} nats or more</dd></dl></figure>"
    )


def _patches(explanation: Mapping[str, Any] | None, item: Item, source: str) -> str:
    """The image again, with the removed patches darkened."""
    if explanation is None:
        return "<small>for the kept patches, start the server with --ficoco-explain</small>"
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
    return (
        f"<svg role=img aria-label='{len(explanation['kept'])} patches that were kept' viewBox='0 0 {width} {height}'>"
        f"<image href='{source}' width='{width}' height='{height}'/><path d='{cells}' fill-opacity='.7'/></svg>"
    )
