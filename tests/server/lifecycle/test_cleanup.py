"""Cleanup after killed processes, which leaves the files of others alone."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from ficoco_vllm.server.lifecycle.cleanup import SHARED_MEMORY, ProcessScanner, tidied

# Prints the name of its shared memory and is then killed.
HOLDER = """
import sys
from multiprocessing import shared_memory
from unittest.mock import patch
with patch("multiprocessing.resource_tracker.register"):
    segment = shared_memory.SharedMemory(create=True, size=4096)
print(segment.name, flush=True)
input()
"""
ATTACHED = HOLDER.replace("create=True, size=4096", "name=sys.argv[1]")


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    """A process that waits for its end."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def name_of(process: subprocess.Popen[str]) -> str:
    """Name that a process prints in its first line."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("alive", [True, False], ids=["a child that still runs", "a child that was killed"])
def test_shared_memory_of_children(alive: bool) -> None:
    scanner = ProcessScanner(seconds=3600, end_seconds=0.2)
    scanner.start()
    with start(HOLDER) as process:
        segment = SHARED_MEMORY / name_of(process)
        scanner.scan()
        if not alive:
            process.kill()
            process.wait()
        assert segment.exists()
        scanner.finish()
        assert not segment.exists()
        assert process.poll() is not None


def test_a_child_from_before_lives_on() -> None:
    with start(HOLDER) as process:
        segment = SHARED_MEMORY / name_of(process)
        scanner = ProcessScanner(seconds=3600, end_seconds=0.2)
        scanner.start()
        scanner.scan()
        scanner.finish()
        assert process.poll() is None
        assert segment.exists()
        process.kill()
    segment.unlink()


def test_shared_memory_that_someone_else_uses_stays() -> None:
    scanner = ProcessScanner(seconds=3600)
    scanner.start()
    with start(HOLDER) as process:
        name = name_of(process)
        scanner.scan()
        with start(ATTACHED, name) as other:
            name_of(other)
            process.kill()
            process.wait()
            # The other one is a child of this process too, but was not there when it looked.
            scanner.finish()
            assert (SHARED_MEMORY / name).exists()
            other.kill()
    (SHARED_MEMORY / name).unlink()


def test_temporary_files_go_and_what_is_compiled_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    leave = "import tempfile; print(tempfile.mkstemp(prefix='left')[1])"
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setenv("TMPDIR", short)
        monkeypatch.setattr(tempfile, "tempdir", None)
        with tidied():
            child = subprocess.run([sys.executable, "-c", leave], capture_output=True, text=True, check=True)
            left = Path(child.stdout.strip())
            assert left.exists()
            assert left.parent == Path(tempfile.gettempdir())
            assert left.parent.parent == Path(short)
            assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(f"{short}/torchinductor_")
        assert list(Path(short).iterdir()) == []
        assert tempfile.gettempdir() == short
        assert os.environ["TMPDIR"] == short
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ


def test_no_folder_in_which_sockets_would_have_names_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    deep = tmp_path / ("d" * 60)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with tidied():
        assert tempfile.gettempdir() == str(deep)
    assert list(deep.iterdir()) == []
