"""Metric files that the processes of a server share, on a disk that may be full."""

import logging
import mmap
import os
from contextlib import suppress
from typing import Any

from prometheus_client.mmap_dict import MmapedDict

# prometheus_client's first size of a file.
_FIRST_BYTES = 2**16

logger = logging.getLogger(__name__)


class ReservedMmapedDict(MmapedDict):
    """prometheus_client's file of values, with its space reserved on the disk before anything is written.

    prometheus_client maps sparse files into memory: where the disk has no space for a page, the kernel ends the process
    by SIGBUS. Here values without space on the disk are counted in memory, where `/metrics` does not see them, and the
    server continues.
    """

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        """Open or make a file; see prometheus_client."""
        if not read_mode:
            filename = _reserved(filename)
        base: Any = super()  # without annotations
        base.__init__(filename, read_mode)

    def _init_value(self, key: str) -> None:
        """Reserve space for a value, its name and two times eight bytes, before prometheus_client grows the file."""
        needed = self._used + len(key.encode()) + 32
        if needed > self._capacity:
            capacity = self._capacity
            while needed > capacity:
                capacity *= 2
            try:
                os.posix_fallocate(self._f.fileno(), 0, capacity)
            except OSError as error:
                self._continue_in_memory(error)
        base: Any = super()
        base._init_value(key)

    def _continue_in_memory(self, error: OSError) -> None:
        _warn(self._f.name, error)
        values = bytes(self._m)
        self._m.close()
        self._f.close()
        self._f: Any = os.fdopen(_memory(), "a+b")
        self._f.write(values)
        self._f.flush()
        self._m = mmap.mmap(self._f.fileno(), self._capacity)


def _reserved(filename: str) -> str:
    """A file with reserved space, or one in memory where the disk has none."""
    try:
        with open(filename, "a+b") as file:
            size = os.fstat(file.fileno()).st_size
            os.posix_fallocate(file.fileno(), 0, max(size, _FIRST_BYTES))
    except OSError as error:
        _warn(filename, error)
        with suppress(OSError):
            if not os.path.getsize(filename):
                os.unlink(filename)  # readers of the folder expect a header in each file
        return f"/proc/self/fd/{_memory()}"
    return filename


def _memory() -> int:
    return os.memfd_create("ficoco-metrics")


def _warn(filename: str, error: OSError) -> None:
    logger.warning(
        "no space for metrics in %s (%s): some metrics of this process will be lost", filename, error
    )
