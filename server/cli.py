"""`ficoco-vllm`, the command line."""

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from ficoco_vllm import __version__
from ficoco_vllm.server.commands import bench, calibrate, explain, methods, plan, serve

COMMANDS = {
    "serve": serve,
    "methods": methods,
    "plan": plan,
    "explain": explain,
    "bench": bench,
    "calibrate": calibrate,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command line without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, or 2 for bad input (with one line on stderr).
    """
    is_program = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="ficoco-vllm", description="Serves LLaVA with a fraction of its visual tokens."
    )
    parser.add_argument("-v", "--version", action="version", version=f"ficoco-vllm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    # vLLM's parser reads the options of `serve`. It takes seconds to import, so the other commands avoid it.
    if arguments[:1] == ["serve"]:
        return int(serve.main(arguments))
    args = parser.parse_args(arguments)
    if args.command is None:
        parser.print_help()
        return 2
    if is_program:
        signal.signal(signal.SIGTERM, _exit)  # ends the servers that a command has started
    return int(COMMANDS[args.command].run(args))


def _exit(number: int, frame: Any) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
