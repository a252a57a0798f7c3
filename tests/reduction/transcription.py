"""Registry of the tests that compare a method with a transcription of its equations."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T", bound=Callable[..., None])


def transcribes(*names: str) -> Callable[[T], T]:
    """Mark a test as the one that compares these methods with their equations in plain float64 loops."""
    return lambda test: test


def transcribed(folder: Path = Path(__file__).parent) -> set[str]:
    """Names of the methods that a test in `folder` is marked for."""
    calls = (node for path in folder.glob("test_*.py") for node in ast.walk(ast.parse(path.read_text())))
    return {
        ast.literal_eval(name)
        for function in calls
        if isinstance(function, ast.FunctionDef)
        for mark in function.decorator_list
        if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id == "transcribes"
        for name in mark.args
    }
