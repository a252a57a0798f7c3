"""A server of our own for as long as a benchmark needs it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ficoco_vllm.compat import multiplies_bfloat16
from ficoco_vllm.server.lifecycle.process import OURS, STOCK, serving

__all__ = ["OURS", "STOCK", "serve", "value_type"]


@contextmanager
def serve(
    arguments: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = OURS,
) -> Iterator[str]:
    """Run a server on a free port until the block ends; see `serving` for the arguments.

    Yields:
        The server's address, without a path.
    """
    with serving(arguments, log, environment, program) as served:
        yield served.url


def value_type() -> tuple[str, int]:
    """What this machine multiplies fast, and bytes of a value of it."""
    return ("bfloat16", 2) if multiplies_bfloat16() else ("float32", 4)
