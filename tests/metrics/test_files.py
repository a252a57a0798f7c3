"""A full disk costs metrics; without the shim it costs the process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.compat

HOOK = "from ficoco_vllm.hooks.metric_files import hook_metric_files; hook_metric_files()"
COUNT = """
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess
count = Counter("count", "of calls", ["name"])
seconds = Histogram("seconds", "of calls", ["name"])
for number in range(NUMBER):
    count.labels(f"{number}-" * 40).inc()
    seconds.labels(f"{number}-" * 40).observe(1)
    count.labels("all").inc()
open_requests = Gauge("open", "now", multiprocess_mode="sum")
open_requests.set(3)
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def run(folder: Path, hooked: bool, number: int = 2000) -> subprocess.CompletedProcess[str]:
    """Count in a separate process."""
    code = (HOOK if hooked else "") + COUNT.replace("NUMBER", str(number))
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip("no rights to mount a small file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_shim_is_still_needed(small_disk: Path) -> None:
    """Fails once prometheus_client survives a full disk itself: then remove the shim."""
    assert run(small_disk, hooked=False).returncode == -signal.SIGBUS


def test_a_disk_that_becomes_full(small_disk: Path) -> None:
    result = run(small_disk, hooked=True)
    assert result.returncode == 0, result.stderr
    assert "No space left on device" in result.stderr
    assert "count_total" in result.stdout, "what was counted before stays"


def test_a_disk_that_is_full(small_disk: Path) -> None:
    full = subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/other"], capture_output=True, check=False)
    assert full.returncode != 0
    result = run(small_disk, hooked=True)
    assert result.returncode == 0, result.stderr
    assert "No space left on device" in result.stderr


def test_with_room_nothing_changes(tmp_path: Path) -> None:
    reported = []
    for hooked in (False, True):
        folder = tmp_path / str(hooked)
        folder.mkdir()
        result = run(folder, hooked)
        assert result.returncode == 0, result.stderr
        assert not result.stderr
        reported.append(sorted(result.stdout.splitlines()))
        assert 'count_total{name="all"} 2000.0' in reported[-1]
    assert reported[0] == reported[1]


def test_a_read_only_folder(tmp_path: Path) -> None:
    """`/metrics` finds the folder, empty."""
    folder = Path("/proc/self/fdinfo")  # not even root makes a file here
    result = run(folder, hooked=True, number=3)
    assert "no space for metrics" in result.stderr
