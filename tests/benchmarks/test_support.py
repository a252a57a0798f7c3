"""The support table: its marks are read, and the committed page is the one that they give."""

from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.benchmarks.gpu.__main__ import ANSWERS
from ficoco_vllm.benchmarks.support import (
    PAGE,
    Combination,
    Proof,
    files,
    locked,
    minors,
    proofs,
    support_table,
)

TOWER = Combination("Family", "tower")
DECODER = Combination("Family", "decoder", "Layers")
PROVEN = [Proof(TOWER, "tests/test_a.py::test_tower"), Proof(DECODER, "tests/test_a.py::test_decoder")]


def cells(lines: list[str]) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_is_current() -> None:
    assert files()[PAGE] == PAGE.read_text()
    assert f"supports vLLM {' and '.join(minors())}" in PAGE.read_text()


def test_cells() -> None:
    """The locked version by the tests themselves; another one by what passed; a GPU by the answers there."""
    first, second = minors()
    assert locked() == first
    run: dict[str, Any] = {"vllm": f"{second}.0", "built": False, "passed": [PROVEN[0].test], "failed": []}
    gpu = {"environment": {"versions": {"vllm": f"{second}.1"}}, "answers": dict.fromkeys(ANSWERS)}
    demo = [Proof(Combination("LLaVA-1.5", "decoder", "Llama"), "tests/test_a.py::test_demo")]
    assert cells(support_table(PROVEN, [run], [])) == [
        ["Family", "tower", "any", "tested", "compiles", "tested from sources", "compiles"],
        ["Family", "decoder", "Layers", "tested", "compiles", "untested", "untested"],
    ]
    ((*_, on_gpu),) = cells(support_table(demo, [run], [gpu]))
    assert on_gpu == "tested"
    run |= {"built": True, "failed": [PROVEN[0].test]}
    assert cells(support_table(PROVEN, [run], []))[0][5] == "untested"
    run |= {"failed": []}
    assert cells(support_table(PROVEN, [run], []))[0][5] == "tested"


MARKED = """
import pytest
pytestmark = [pytest.mark.engine, pytest.mark.proves(family="A", site="tower")]
@pytest.mark.parametrize(
    "x", [pytest.param(1, marks=pytest.mark.proves(family="B", site=("decoder", "both"), decoder="C"))]
)
def test_one(x): ...
def test_two(): ...
def helper(): ...
"""


def test_marks_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "tests" / "models"
    folder.mkdir(parents=True)
    (folder / "test_it.py").write_text(MARKED)
    read = [(proof.test.rpartition("/")[2], proof.combination.family) for proof in proofs(tmp_path / "tests")]
    first = [("test_it.py::test_one", family) for family in "ABB"]
    assert read == [*first, ("test_it.py::test_two", "A")]


@pytest.mark.parametrize(
    "mark",
    [
        'family="A"',
        'family="A", site="projector"',
        'family="A", site="decoder"',
        'family="A", site=("decoder", "tower"), decoder="B"',
        'family="A", site="tower", decoder="B"',
        'family=NAME, site="tower"',
        '"A", "tower"',
        'family="A", site="tower", vllm="0.33"',
    ],
)
def test_wrong_marks_are_refused(tmp_path: Path, mark: str) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(f"@pytest.mark.proves({mark})\ndef test_one(): ...\n")
    with pytest.raises(ValueError, match=r"test_it.py: pytest.mark.proves\(.*; allowed: "):
        proofs(tmp_path / "tests")
