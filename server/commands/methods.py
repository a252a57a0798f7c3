"""`ficoco-vllm methods`: which method to choose, all methods with site and source, the settings of one."""

import argparse
import re
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from ficoco_vllm.config import DEFAULT_METHOD
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.advice import as_text
from ficoco_vllm.reduction.control import CONTROLS
from ficoco_vllm.reduction.method import SITES
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.registry import names
from ficoco_vllm.reduction.settings import Settings, describe
from ficoco_vllm.server.commands.arguments import fail

_WIDTH = 100
_SETTING = re.compile(r"^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", re.DOTALL | re.MULTILINE)


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "methods", help="list the reduction methods and which to choose, or the settings of one"
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="a method whose settings are printed")


def run(args: argparse.Namespace) -> int:
    """Print the lists, or the settings of one method with meaning, default and range.

    Returns:
        0, or 2 if there is no such method.
    """
    try:
        lines = _all_methods() if args.name is None else _one_method(args.name)
    except ValueError as error:
        return fail(str(error))
    print("\n".join(lines))
    return 0


def obstacle(name: str) -> str | None:
    """Reason why LLaVA-1.5 cannot serve a method, or None; the method can still be planned.

    Args:
        name: name of a method, or of one that reduces twice.
    """
    if name in PIPELINES:
        return None
    if name in CONTROLS:
        return f"{name} needs {CONTROLS[name].needs}"
    try:
        get(name).configure().check_signals(SITES[get(name).site])
    except ValueError as error:
        return str(error)
    return None


def _all_methods() -> list[str]:
    rows = []
    obstacles = {name: obstacle(name) for name in names()}
    for name, reason in obstacles.items():
        pipeline = PIPELINES.get(name)
        method = CONTROLS.get(name) or pipeline or get(name)
        site = f"{pipeline.encoder.site}+{pipeline.decoder.site}" if pipeline else _site(name)
        rows.append((name, site, "no" if reason else "yes", _source(method.source), method.title))
    width = _width()
    refused = [f"  {reason}" for _, reason in sorted(obstacles.items()) if reason]
    return [
        *as_text(width),
        "",
        *_table([("NAME", "SITE", "SERVED", "SOURCE", "TITLE"), *sorted(rows)]),
        "",
        "Not served with every model:",
        *(part for line in refused for part in textwrap.wrap(line, width, subsequent_indent="    ")),
        "",
        f"A server with a budget and no method uses {DEFAULT_METHOD}. Settings: `ficoco-vllm methods NAME`.",
    ]


def _one_method(name: str) -> list[str]:
    if name in PIPELINES:
        parts = (PIPELINES[name].encoder.name, PIPELINES[name].decoder.name)
        title = f"{PIPELINES[name].title} ({name}): first {parts[0]}, then {parts[1]}"
        return [title, "", *_one_method(parts[0]), "", *_one_method(parts[1])]
    if name in CONTROLS:
        control = CONTROLS[name]
        return [
            f"{control.title} ({name}): no reduction, the image is shrunk until it has no more visual tokens",
            f"site     {control.site}",
            f"served   by {control.needs}",
            f"source   {_source(control.source)}",
            "no settings",
        ]
    method, reason = get(name), obstacle(name)
    lines = [
        f"{method.title} ({method.name})",
        f"site     {method.site}",
        f"served   {'no: ' + reason if reason else 'yes'}",
        f"source   {_source(method.source)}",
        f"signals  {', '.join(sorted(method.required_signals())) or 'none'}",
        "",
    ]
    rows = [("SETTING", "DEFAULT", "ALLOWED")]
    fields = method.settings.model_fields
    rows += [(key, str(field.default), describe(field)) for key, field in fields.items()]
    heading, *table = _table(rows)
    lines.append(heading if fields else "no settings")
    meanings = _meanings(method.settings)
    for key, line in zip(fields, table, strict=True):
        lines.append(line)
        meaning = meanings.get(key, "")
        lines += textwrap.wrap(meaning, _width(), initial_indent="    ", subsequent_indent="    ")
    return lines


def _site(name: str) -> str:
    """Site of a method or a control."""
    return CONTROLS[name].site if name in CONTROLS else get(name).site


def _meanings(settings: type[Settings]) -> dict[str, str]:
    """Map from a setting to its meaning, from the docstrings of the models that define it."""
    meanings: dict[str, str] = {}
    for model in reversed(settings.__mro__):
        _, _, attributes = (vars(model).get("__doc__") or "").partition("Attributes:\n")
        meanings |= {name: " ".join(text.split()) for name, text in _SETTING.findall(attributes)}
    return meanings


def _source(source: str) -> str:
    """Print an arXiv identifier as one, and another source as it is."""
    if source == "none":
        return "no paper"
    return f"arXiv:{source}" if re.fullmatch(r"\d{4}\.\d{4,5}(v\d+)?", source) else source


def _width() -> int:
    return min(_WIDTH, shutil.get_terminal_size().columns)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
