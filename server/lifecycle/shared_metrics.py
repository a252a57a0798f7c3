"""The folder through which the processes of one server add up their metrics."""

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from ficoco_vllm.environment import COUNTS_IN_FILES

# prometheus_client's name for the folder that processes share.
MULTIPROC = "PROMETHEUS_MULTIPROC_DIR"


@contextmanager
def shared_metrics(wanted: bool) -> Iterator[str | None]:
    """Add the metrics of engine core and workers to `/metrics` of the API server.

    prometheus_client adds up the metrics of several processes if a folder is named before it is imported. vLLM names
    one only for several API servers. A folder that the user names stays.

    Args:
        wanted: whether the processes share metrics at all.

    Yields:
        The folder, None if we did not create it.
    """
    if not wanted:
        yield None
        return
    os.environ[COUNTS_IN_FILES] = "1"
    try:
        with _folder() as folder:
            yield folder
    finally:
        del os.environ[COUNTS_IN_FILES]


@contextmanager
def _folder() -> Iterator[str | None]:
    if MULTIPROC in os.environ:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="ficoco-metrics-", ignore_cleanup_errors=True) as folder:
        os.environ[MULTIPROC] = folder
        try:
            yield folder
        finally:
            if (
                os.environ.get(MULTIPROC) == folder
            ):  # later subprocesses must not look for a folder that is gone
                del os.environ[MULTIPROC]


def starts_several_servers(args: argparse.Namespace) -> bool:
    """Whether vLLM will start several API servers.

    Args:
        args: options parsed by vLLM's parser.
    """
    if args.api_server_count is not None:
        return bool(args.api_server_count > 1)
    balanced_outside = (
        args.data_parallel_external_lb
        or args.data_parallel_hybrid_lb
        or args.data_parallel_multi_port_external_lb
        or args.data_parallel_rank is not None
        or args.data_parallel_start_rank is not None
    )
    return bool(args.data_parallel_size > 1 and not balanced_outside)
