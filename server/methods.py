"""`ficoco-vllm methods`: what can be served, where it works, and where it comes from."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.settings import describe


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser("methods", help="list the reduction methods, or the settings of one")
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method, to see its settings")


def run(args: argparse.Namespace) -> int:
    """Print the list, or one method with its settings, their defaults and ranges.

    Returns:
        0, or 2 if there is no such method.
    """
    try:
        lines = _all_methods() if args.name is None else _one_method(args.name)
    except ValueError as error:
        print(f"ficoco-vllm: error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


def _all_methods() -> list[str]:
    rows = [("NAME", "SITE", "SOURCE", "TITLE")]
    rows += [(name, get(name).site, f"arXiv:{get(name).source}", get(name).title) for name in available()]
    return _table(rows)


def _one_method(name: str) -> list[str]:
    method = get(name)
    head = [
        f"{method.title} ({method.name})",
        f"site     {method.site}",
        f"source   arXiv:{method.source}",
        f"signals  {', '.join(sorted(method.required_signals())) or 'none'}",
        "",
    ]
    rows = [("SETTING", "DEFAULT", "ALLOWED")]
    for key, field in method.settings.model_fields.items():
        rows.append((key, str(field.default), describe(field)))
    return head + _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
