"""Argument types and error reporting that the commands share."""

import argparse
import sys


def fail(reason: str, status: int = 2) -> int:
    """Report an error in one line on stderr.

    Args:
        reason: text for the user.
        status: exit status: 2 for input that is not allowed, 1 for a failure of valid input.

    Returns:
        The status.
    """
    print(f"ficoco-vllm: error: {reason}", file=sys.stderr)
    return status


def counts(text: str) -> tuple[int, ...]:
    """Argument type: integers of at least 1, separated by commas.

    Args:
        text: for example `288,192`.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; allowed: integers as in 288,192"
        ) from error
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: integers of at least 1")
    return values


def integer(text: str) -> int | str:
    """Argument type: an integer. Any other text stays as it is, for the check that knows the allowed range to refuse.

    Args:
        text: for example `64`.
    """
    try:
        return int(text)
    except ValueError:
        return text


def names(text: str) -> tuple[str, ...]:
    """Argument type: names separated by commas.

    Args:
        text: for example `ficoco-v,tome`.
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def base_url(text: str) -> str:
    """Argument type: URL of a server, without the path of its API.

    Args:
        text: the URL, with or without `/v1`.
    """
    return text.rstrip("/").removesuffix("/v1")
