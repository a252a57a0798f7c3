"""`ficoco-vllm`, the command line.

A command's module is imported when the command runs: listing the commands is fast.
"""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ficoco_vllm import __version__
from ficoco_vllm.server.commands.arguments import fail
from ficoco_vllm.server.commands.preflight import check_named_methods

# Command -> its line in the list. Its module in `server/commands` has `add_parser` and `run`.
COMMANDS = {
    "serve": "serve a model with vLLM's OpenAI-compatible server",
    "methods": "list the reduction methods and which to choose, or the settings of one",
    "plan": "compute the cost of a method and a budget on a model: tokens, TFLOPs, KV cache, memory, speed-up",
    "explain": "draw which patches of an image are kept, and where the others' information goes",
    "bench": "measure accuracy and load through the endpoint",
    "calibrate": "find the smallest budget that answers your own questions as the full model does",
    "replay": "show what --ficoco-target-agreement would have done on a log of requests",
    "completion": "print the completion of a shell",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: command line without the program's name; None takes the process's own.

    Returns:
        The exit status: 0, 2 for bad input (with one line on stderr), 130 after Ctrl-C, 143 after SIGTERM.
    """
    is_program = arguments is None
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    chosen = arguments[0] if arguments else None
    try:
        if chosen == "serve":
            return _ended(
                int(command("serve").main(arguments[1:])), is_program
            )  # vLLM's parser reads the options
        try:
            check_named_methods(arguments)
        except ValueError as error:
            return fail(str(error))
        parser = make_parser([name for name in COMMANDS if name == chosen])
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help()
            return 2
        if is_program:
            signal.signal(signal.SIGTERM, _terminate)  # ends the servers that a command has started
        return _ended(int(command(args.command).run(args)), is_program)
    except BrokenPipeError:  # of `| head`; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("ficoco-vllm: stopped", file=sys.stderr)
        return _ended(130, is_program)
    except asyncio.CancelledError:  # see `_terminate`
        return _ended(128 + signal.SIGTERM, is_program)


def make_parser(complete: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command line.

    Args:
        complete: commands with their options, whose modules are imported; the others have a name and a line.
    """
    parser = argparse.ArgumentParser(
        prog="ficoco-vllm",
        description="Serves vision-language models with a fraction of their visual tokens.",
    )
    parser.add_argument("-v", "--version", action="version", version=f"ficoco-vllm {__version__}")
    # For `completion`; vLLM's parser has the options of `serve`.
    parser.set_defaults(full_parser=lambda: make_parser([name for name in COMMANDS if name != "serve"]))
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, line in COMMANDS.items():
        if name in complete:
            command(name).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=line)
    return parser


def command(name: str) -> Any:
    """The module of a command."""
    return import_module(f"ficoco_vllm.server.commands.{name}")


def _ended(status: int, is_program: bool) -> int:
    """End the program immediately; otherwise Triton's bindings would list all that they have not freed."""
    if is_program:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _terminate(number: int, frame: Any) -> None:
    """End the command, and with it what it has started."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        sys.exit(128 + number)
    # Raised in a task, SystemExit would be printed as that task's error.
    loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(loop)])


if __name__ == "__main__":
    sys.exit(main())
