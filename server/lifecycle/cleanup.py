"""What processes of a server leave behind when one of them is killed: temporary files, shared memory, children."""

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
# Between two looks at the processes. Shared memory is made while a server starts, and held until it ends.
LOOK_SECONDS = 5.0
# For children that outlive the server; vLLM's workers notice within a second that their parent is gone.
END_SECONDS = 10.0
# sun_path of a Unix socket takes 107 bytes; vLLM's are named by a UUID (36).
_MOST_FOLDER_BYTES = 107 - 36 - 1
# Of torch: by default a folder in the temporary one, which would be compiled anew at each start.
_COMPILED = "TORCHINDUCTOR_CACHE_DIR"
_TRACKER = "from multiprocessing.resource_tracker import main"


@contextmanager
def tidied() -> Iterator[None]:
    """Take away at the end of the block whatever the processes of a server that ran in it have left.

    - Temporary files and sockets: all processes get a folder of their own as `TMPDIR`. vLLM leaves seven sockets and
      a rendezvous file of each server there, however it ends.
    - Children that still run, and their shared memory: vLLM's processes give it back themselves unless one of them is
      killed.

    What is compiled stays where it is without this.
    """
    with _own_folder():
        watch = Watch()
        watch.start()
        try:
            yield
        finally:
            watch.finish()


@contextmanager
def _own_folder() -> Iterator[None]:
    before, variables = tempfile.tempdir, {name: os.environ.get(name) for name in ("TMPDIR", _COMPILED)}
    with tempfile.TemporaryDirectory(prefix="ficoco-serve-", ignore_cleanup_errors=True) as folder:
        if len(os.fsencode(folder)) <= _MOST_FOLDER_BYTES:
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
    """Where torch puts it without the variable."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


class Watch:
    """Remembers the processes below this one and the shared memory that they have mapped."""

    def __init__(self, seconds: float = LOOK_SECONDS, end_seconds: float = END_SECONDS) -> None:
        """Watch this process.

        Args:
            seconds: between two looks.
            end_seconds: for children to end by themselves.
        """
        self._seconds, self._end_seconds = seconds, end_seconds
        # Whatever runs already is somebody else's.
        self._before = set(psutil.Process().children(recursive=True))
        self._processes: set[psutil.Process] = set()
        self._segments: set[Path] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ficoco-leftovers", daemon=True)

    def start(self) -> None:
        """Look from now on, in a thread of its own."""
        self._thread.start()

    def look(self) -> None:
        """Remember what is there now."""
        with suppress(psutil.Error):
            for process in set(psutil.Process().children(recursive=True)) - self._before:
                with suppress(psutil.Error, OSError):
                    # multiprocessing's own cleaner ends with this process, and not before.
                    if _TRACKER not in " ".join(process.cmdline()):
                        self._processes.add(process)
                        self._segments |= _mapped(process.pid)

    def finish(self) -> None:
        """Stop looking; end the children that are left and take away their shared memory if nobody else has it."""
        self._ended.set()
        self._thread.join()
        _, alive = psutil.wait_procs(self._processes, timeout=self._end_seconds)
        for process in alive:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=END_SECONDS)
        left = {segment for segment in self._segments if segment.exists()}
        if left:
            for pid in psutil.pids():
                with suppress(OSError):
                    left -= _mapped(pid)
        for segment in left:
            segment.unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self.look()


def _mapped(pid: int) -> set[Path]:
    """Files of the shared memory that a process has mapped."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="replace") as maps:
        lines = [line for line in maps if f" {SHARED_MEMORY}/" in line]
    return {Path(line.split(maxsplit=5)[5].strip().removesuffix(" (deleted)")) for line in lines}
