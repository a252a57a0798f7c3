"""How a command says that it failed."""

import sys


def fail(reason: str, status: int = 2) -> int:
    """Say why in one line on stderr.

    Args:
        reason: for the user.
        status: exit status: 2 for input that is not allowed, 1 for what went wrong with it.

    Returns:
        The status.
    """
    print(f"ficoco-vllm: error: {reason}", file=sys.stderr)
    return status
