"""Distributions of `make dist`, and a Python that has them without the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Everything but what is built, fetched or cached.
NOT_SOURCES = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "site")


@dataclass(frozen=True)
class Release:
    """The two files of a release."""

    sdist: Path
    wheel: Path


def build(folder: Path) -> Release:
    """Build both from a copy of the sources, the wheel from the sdist, without a network."""
    sources = folder / "repository"
    shutil.copytree(ROOT, sources, ignore=NOT_SOURCES, symlinks=True)
    out = folder / "dist"
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return Release(sdist, wheel)


def install(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel, on top of the packages that the tests run with.

    A path in a `.pth` file puts those packages after the environment's own and reads none of their `.pth` files, so
    the editable install of the repository is not among them.

    Returns:
        Its Python.
    """
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=120)
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "serving.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # As requirements/install.sh does, for an environment whose torchvision was built for CUDA.
    (site / "torchvision.pth").write_text(
        "import ficoco_vllm.compat; ficoco_vllm.compat.hook_torchvision()\n"
    )
    return python


def outside(environment: dict[str, str] | None = None) -> dict[str, str]:
    """An environment in which nothing points to the repository."""
    return {key: value for key, value in (environment or os.environ).items() if key != "PYTHONPATH"}
