"""`ficoco-vllm methods`: the reduction methods with their site, source and settings."""

import argparse
import re
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.settings import describe
from ficoco_vllm.server.commands.arguments import fail


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("methods", help="list the reduction methods, or the settings of one")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method whose settings are printed")


def run(args: argparse.Namespace) -> int:
    """Print the list, or the settings of one method with their defaults and ranges.

    Returns:
        0, or 2 if there is no such method.
    """
    try:
        lines = _all_methods() if args.name is None else _one_method(args.name)
    except ValueError as error:
        return fail(str(error))
    print("\n".join(lines))
    return 0


def _all_methods() -> list[str]:
    rows = [("NAME", "SITE", "SOURCE", "TITLE")]
    rows += [(name, get(name).site, _source(get(name).source), get(name).title) for name in available()]
    for name, pipeline in PIPELINES.items():
        sites = f"{pipeline.encoder.site}+{pipeline.decoder.site}"
        rows.append((name, sites, _source(pipeline.source), pipeline.title))
    return _table([rows[0], *sorted(rows[1:])])


def _one_method(name: str) -> list[str]:
    if name in PIPELINES:
        parts = (PIPELINES[name].encoder.name, PIPELINES[name].decoder.name)
        title = f"{PIPELINES[name].title} ({name}): first {parts[0]}, then {parts[1]}"
        return [title, "", *_one_method(parts[0]), "", *_one_method(parts[1])]
    method = get(name)
    head = [
        f"{method.title} ({method.name})",
        f"site     {method.site}",
        f"source   {_source(method.source)}",
        f"signals  {', '.join(sorted(method.required_signals())) or 'none'}",
        "",
    ]
    rows = [("SETTING", "DEFAULT", "ALLOWED")]
    for key, field in method.settings.model_fields.items():
        rows.append((key, str(field.default), describe(field)))
    return head + _table(rows)


def _source(source: str) -> str:
    """Print an arXiv identifier as one, and other sources, such as "none", as they are."""
    return f"arXiv:{source}" if re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", source) else source


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
