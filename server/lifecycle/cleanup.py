"""Cleanup after the processes of a server, including killed ones: temporary files, shared memory, child processes."""

import getpass
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SHARED_MEMORY = Path("/dev/shm")
# Interval between two scans of the processes. Servers map shared memory while they start and hold it until they end.
SCAN_SECONDS = 5.0
# Grace for children that outlive the server; vLLM's workers notice within a second that their parent is gone.
END_SECONDS = 10.0
# The path of a Unix socket takes 107 bytes; vLLM names its sockets by a UUID (36).
_MAX_FOLDER_BYTES = 107 - 36 - 1
# torch compiles into the temporary folder by default; in a folder of our own it would recompile at each start.
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_TRACKER = "from multiprocessing.resource_tracker import main"


@contextmanager
def tidied() -> Iterator[None]:
    """Clean up after the processes of a server that runs in the block.

    - Temporary files and sockets: all processes share a new folder as `TMPDIR`. vLLM leaves seven sockets and a
      rendezvous file of each server there, however it ends.
    - Running children and their shared memory: vLLM's processes release it themselves unless one of them is killed.

    Compiled code keeps its usual folder.
    """
    with _temporary_folder():
        scanner = ProcessScanner()
        scanner.start()
        try:
            yield
        finally:
            scanner.finish()


@contextmanager
def _temporary_folder() -> Iterator[None]:
    before, variables = tempfile.tempdir, {name: os.environ.get(name) for name in ("TMPDIR", _COMPILED)}
    with tempfile.TemporaryDirectory(prefix="ficoco-serve-", ignore_cleanup_errors=True) as folder:
        if len(os.fsencode(folder)) <= _MAX_FOLDER_BYTES:
            os.environ.setdefault(_COMPILED, _compiled_folder())
            os.environ["TMPDIR"] = tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before
            for name, value in variables.items():
                if value is not None:
                    os.environ[name] = value
                else:
                    os.environ.pop(name, None)


def _compiled_folder() -> str:
    """Torch's default for the variable."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


class ProcessScanner:
    """Records the child processes of this one and the shared memory that they map."""

    def __init__(self, seconds: float = SCAN_SECONDS, end_seconds: float = END_SECONDS) -> None:
        """Ignore the children that run already.

        Args:
            seconds: interval between two scans.
            end_seconds: grace for children to end by themselves.
        """
        self._seconds, self._end_seconds = seconds, end_seconds
        self._before = set(psutil.Process().children(recursive=True))
        self._processes: set[psutil.Process] = set()
        self._segments: set[Path] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ficoco-cleanup", daemon=True)

    def start(self) -> None:
        """Scan periodically in a thread."""
        self._thread.start()

    def scan(self) -> None:
        """Record the children that run now."""
        with suppress(psutil.Error):
            for process in set(psutil.Process().children(recursive=True)) - self._before:
                with suppress(psutil.Error, OSError):
                    # The resource tracker of multiprocessing ends with this process, not before.
                    if _TRACKER not in " ".join(process.cmdline()):
                        self._processes.add(process)
                        self._segments |= _mapped(process.pid)

    def finish(self) -> None:
        """Stop scanning, kill the children that still run, and unlink shared memory that no other process maps."""
        self._ended.set()
        self._thread.join()
        _, alive = psutil.wait_procs(self._processes, timeout=self._end_seconds)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=END_SECONDS)
        orphaned = {segment for segment in self._segments if segment.exists()}
        if orphaned:
            for pid in psutil.pids():
                with suppress(OSError):
                    orphaned -= _mapped(pid)
        for segment in orphaned:
            segment.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.scan()


def _mapped(pid: int) -> set[Path]:
    """Shared memory files that a process maps."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        lines = [line for line in maps if f" {SHARED_MEMORY}/" in line]
    return {Path(line.split(maxsplit=5)[5].strip().removesuffix(" (deleted)")) for line in lines}
