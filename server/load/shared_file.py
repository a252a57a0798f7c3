"""A JSON file that the processes of a server change in turn."""

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


class SharedFile:
    """A JSON file, guarded by a lock file next to it."""

    def __init__(self, path: Path) -> None:
        """Use a file that may not exist yet, in a folder that does.

        Args:
            path: path of the file.
        """
        self.path = path
        self._lock = path.with_name(f"{path.name}.lock")

    def update(self, change: Callable[[Any], Any]) -> bool:
        """Change the content.

        Never waits: a process that is suspended while it holds the lock must not stop the others.

        Args:
            change: from the content, None if there is no file, to the new one.

        Returns:
            False if another process is changing it: then nothing happens.
        """
        with self._lock.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            # Atomically: a process may end at any moment.
            draft = self.path.with_name(f"{self.path.name}.draft")
            draft.write_text(json.dumps(change(self.read())), encoding="utf-8")
            draft.replace(self.path)
            return True

    def read(self) -> Any:
        """The content, None if there is no file."""
        try:
            return json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
