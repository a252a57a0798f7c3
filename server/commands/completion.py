"""`ficoco-vllm completion`: commands, options and method names for bash and zsh."""

import argparse
from typing import Any

from ficoco_vllm.server.commands.serve_options import add_arguments
from ficoco_vllm.server.commands.vllm_options import add_vllm_options

SHELLS = ("bash", "zsh")
_EPILOG = """\
bash:  ficoco-vllm completion bash > ~/.local/share/bash-completion/completions/ficoco-vllm
zsh:   ficoco-vllm completion zsh > "${fpath[1]}/_ficoco-vllm"
"""
# Where a method is named, a file, a folder.
_METHODS = ("ficoco_method", "method", "name")
_FILES = ("config", "ficoco_config", "out", "json")
_FOLDERS = ("model", "model_tag")


def add_parser(subparsers: Any) -> None:
    """Add the command's options."""
    parser = subparsers.add_parser(
        "completion",
        help="print the completion of a shell",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=SHELLS)


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Returns:
        0.
    """
    print(script(args.shell, args.full_parser()))
    return 0


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion of one shell.

    Args:
        shell: one of `SHELLS`.
        parser: the parser of the command line, with the options of all commands but `serve`; changed.
    """
    import shtab

    from ficoco_vllm.reduction.registry import names

    commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    serve = commands["serve"]
    add_arguments(serve)
    add_vllm_options(serve)
    methods = names()
    for command in commands.values():
        for action in command._actions:
            if action.dest in _METHODS:
                action.choices = methods
            elif action.dest in _FILES and action.nargs != 0:
                action.complete = shtab.FILE
            elif action.dest in _FOLDERS:
                action.complete = shtab.DIRECTORY
    return str(shtab.complete(parser, shell))
