"""The README does what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES
from tests.support.server import Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def transcript_of(url: str) -> tuple[str, str]:
    """What the first screen's code prints, asking the server at `url`, and what the README says it prints."""
    code = next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "examples()" in block
    )
    (transcript,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("http://127.0.0.1:8000", url), {})
    return printed.getvalue(), transcript


@pytest.mark.server
def test_transcript_is_what_the_server_answers(server: Server) -> None:
    """The first screen's code, run against the demo model as `make serve` serves it."""
    printed, transcript = transcript_of(server.url)
    assert printed == transcript


def test_every_method_is_listed() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row.split("|")[1])}
    assert set(available()) | set(PIPELINES) <= listed


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
