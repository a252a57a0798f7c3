"""Benchmarks, server and kernels are modules of `ficoco_vllm`: under a second name every class would exist twice."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "kernels", "server")
COMMAND = re.compile(rf"-m[\s\",']+({'|'.join(FOLDERS)})\.\w")


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, without its history of changes."""
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / name for name in listed.stdout.splitlines() if name != "docs/log.md"]
    return [file for file in files if file.is_file() and not file.is_symlink()]


def imports(text: str) -> Iterator[str]:
    """Top-level packages of all imports."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_no_module_is_imported_under_a_second_name() -> None:
    result = {file for file in tracked("*.py") if set(FOLDERS) & set(imports(file.read_text()))}
    assert result == set()


def test_no_command_runs_a_module_under_a_second_name() -> None:
    files = tracked("*.py", "*.md", "*.toml", "*.yml", "*.yaml", "Makefile", ".ci/*")
    result = {f"{file}: {match[0]}" for file in files for match in COMMAND.finditer(file.read_text())}
    assert result == set()


def test_shipped_code_imports_neither_tools_nor_tests() -> None:
    shipped = tracked("ficoco_vllm/*.py", "benchmarks/*.py", "kernels/*.py", "server/*.py")
    result = {file for file in shipped if {"tools", "tests"} & set(imports(file.read_text()))}
    assert result == set()


def test_the_check_can_fail() -> None:
    assert list(imports("from benchmarks.harness import results")) == ["benchmarks"]
    # In two parts, since these lines are searched too.
    assert COMMAND.search('[sys.executable, "-m", ' + '"benchmarks.overview"]')
    assert COMMAND.search("python -m " + "benchmarks.overview")
    assert not COMMAND.search("python -m ficoco_vllm.benchmarks.overview")
