"""Lists of integers on the command line."""

import argparse


def numbers(text: str) -> tuple[int, ...]:
    """Integers of at least 1 separated by commas.

    Args:
        text: as `288,192`.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed; allowed: integers as in 288,192"
        ) from error
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed: integers of at least 1")
    return found
