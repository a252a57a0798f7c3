"""The README does what it says, and so do the examples."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from examples.chat import ask
from ficoco_vllm.demo_model import examples
from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.pipeline import PIPELINES
from tests.support.server import DEMO_KEEP, Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def transcript_of(url: str) -> tuple[str, str]:
    """Output of the README's client for the server at `url`, and the output that the README shows."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (transcript,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.chdir(ROOT),
        mock.patch.dict(os.environ, FICOCO_URL=url),
    ):
        exec(code, {})
    return printed.getvalue(), transcript


def run_example(name: str, *arguments: str, **environment: str) -> str:
    """Output of an example, run as its page says."""
    command = [sys.executable, f"examples/{name}", *arguments]
    variables = {**os.environ, **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.server
def test_transcript_is_what_the_server_answers(server: Server) -> None:
    """The first screen's code, run against the demo model as `make serve` serves it."""
    printed, transcript = transcript_of(server.url)
    assert printed == transcript


@pytest.mark.server
def test_all_images_of_the_demo_model_are_answered(server: Server) -> None:
    for example in examples():
        answer = ask(example.image, example.question, server.url)
        assert (answer.choices[0].message.content or "").strip() == example.answer
        assert answer.usage is not None
        assert answer.usage.prompt_tokens < 2 * DEMO_KEEP


@pytest.mark.server
def test_example_chat(server: Server) -> None:
    image = examples()[0]
    printed = run_example(
        "chat.py", str(image.image), image.question, "--url", server.url, "--method", "tome", "--keep", "96"
    )
    assert "'method': 'tome'" in printed
    assert "'visual_tokens_kept': 96" in printed


@pytest.mark.server
def test_example_budget_per_request(server: Server) -> None:
    lines = run_example("budget_per_request.py", server.url).splitlines()
    kept = [int(number) for line in lines for number in re.findall(r"'visual_tokens_kept': (\d+)", line)]
    assert kept == [DEMO_KEEP, 192, 128, 576]


@pytest.mark.engine
def test_example_offline() -> None:
    # The engine of the example is in a process of its own, as for a user.
    printed = run_example("offline.py", VLLM_ENABLE_V1_MULTIPROCESSING="1")
    kept, more = [int(number) for number in re.findall(r"(\d+) prompt tokens", printed)]
    assert more - kept == 192 - 64
    assert printed.count(examples()[0].answer) == 2


def test_example_reduce_tensors() -> None:
    assert run_example("reduce_tensors.py").startswith("533 tokens stand for 576 patches")


def test_every_example_is_listed() -> None:
    listed = (ROOT / "examples" / "README.md").read_text()
    assert all(f"]({path.name})" in listed for path in (ROOT / "examples").glob("*.py"))


def test_every_method_is_listed() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([a-z0-9-]+)`", row.split("|")[1])}
    assert set(available()) | set(PIPELINES) <= listed


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
    for page in [*pages, *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z-]+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
