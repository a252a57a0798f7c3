"""The page and the notebook say what happens."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.support import notebook

DOCS = Path(__file__).parents[2] / "docs"
PERCENT = re.compile(r" *(\d+)%")


def test_the_page() -> None:
    page = (DOCS / "huggingface.md").read_text()
    printed = io.StringIO()
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            exec(block, namespace)
    (transcript,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    assert printed.getvalue().strip() == transcript.strip()


@pytest.mark.filterwarnings("ignore:FigureCanvasAgg is non-interactive:UserWarning")
def test_the_notebook() -> None:
    """Its outputs are what its cells print now; of figures only the number is compared."""
    text = (DOCS / "huggingface.ipynb").read_text()
    assert len(text) < 300_000
    content = json.loads(text)
    stored = [cell["outputs"] for cell in notebook.code_cells(content)]
    outputs = notebook.run(content)
    assert [len(cell) for cell in outputs] == [len(cell) for cell in stored]
    for cell, expected in zip(outputs, stored, strict=True):
        printed, shown = notebook.text_of(cell), notebook.text_of(expected)
        assert PERCENT.sub("", printed) == PERCENT.sub("", shown)
        # Rounding on another CPU may change the answers to two of twenty questions.
        for now, then in zip(PERCENT.findall(printed), PERCENT.findall(shown), strict=True):
            assert abs(int(now) - int(then)) <= 10
