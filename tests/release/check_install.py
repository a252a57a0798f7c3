"""`make release-check`: the files in dist/ install into a clean environment, without the repository, and serve."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.release import ROOT, outside
from tests.support.server import serve
from tests.test_readme import transcript_of

TIMEOUT_SECONDS = 1200


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python into which the released installer has put the released wheel."""
    (sdist,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    folder = tmp_path_factory.mktemp("clean")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    (unpacked,) = (folder / "sdist").iterdir()
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=120)
    python = folder / "venv" / "bin" / "python"
    command = [str(unpacked / "requirements" / "install.sh"), "--wheel", str(wheel), str(python)]
    subprocess.run(command, check=True, cwd=folder, env=outside(), timeout=TIMEOUT_SECONDS)
    unpacked.rename(folder / "moved away")  # the installation must not need it
    return python


@pytest.mark.server
@pytest.mark.timeout(2 * TIMEOUT_SECONDS)
def test_a_clean_environment_serves(python: Path, tmp_path: Path) -> None:
    code = "import ficoco_vllm; print(ficoco_vllm.__file__)"
    command = [str(python), "-c", code]
    where = subprocess.run(command, check=True, cwd=tmp_path, env=outside(), capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(python.parents[1])
    arguments = ("--ficoco-method", "ficoco-v", "--ficoco-keep", "64")
    with serve(tmp_path / "log", *arguments, python=python, folder=tmp_path) as server:
        printed, expected = transcript_of(server.url)
    assert printed == expected
