"""The README does what it says, and so do the examples."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

from examples.chat import ask
from ficoco_vllm import demo_model
from ficoco_vllm.demo_model import examples
from ficoco_vllm.hf import reduce_tokens
from ficoco_vllm.reduction import available
from ficoco_vllm.reduction.advice import as_markdown
from ficoco_vllm.reduction.pipeline import PIPELINES
from tests.support.server import API_KEY, DEMO_KEEP, Server

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def code_of(language: str, word: str) -> str:
    """The README's only block in the language that holds the word."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    (code,) = [block for block in blocks if word in block]
    return str(code)


CLIENT = code_of("python", "import ask")
IMAGE, QUESTION = re.findall(r'ask\("([^"]+)", "([^"]+)"\)', CLIENT)[0]
(TRANSCRIPT,) = re.findall(r"^# (.*)$", CLIENT, re.MULTILINE)


def transcript_of(url: str) -> tuple[str, str]:
    """Output of the README's client for the server at `url`, and the output that the README shows."""
    printed = io.StringIO()
    with (
        contextlib.redirect_stdout(printed),
        contextlib.chdir(ROOT),
        mock.patch.dict(os.environ, FICOCO_URL=url),
    ):
        exec(CLIENT, {})
    return printed.getvalue(), f"{TRANSCRIPT}\n"


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
@pytest.mark.needs(bool(shutil.which("curl")), "the README's curl line: no curl")
def test_curl_gets_the_same_answer(server: Server, tmp_path: Path) -> None:
    """The pasted lines, for the test server's address and key."""
    (tmp_path / ".curlrc").write_text(f'header = "Authorization: Bearer {API_KEY}"\n')
    lines = code_of("bash", "curl").replace("http://127.0.0.1:8000", server.url)
    variables = {**os.environ, "CURL_HOME": str(tmp_path)}
    done = subprocess.run(
        ["bash", "-eu"],
        input=lines.encode(),
        cwd=ROOT,
        env=variables,
        capture_output=True,
        check=True,
        timeout=300,
    )
    answer = json.loads(done.stdout)
    text, usage = answer["choices"][0]["message"]["content"], answer["usage"]
    assert f"{text.strip()} {usage['prompt_tokens']} {usage['ficoco']}" == TRANSCRIPT


def test_hugging_face_gets_the_same_answer() -> None:
    """By the README's line, with the block that it leaves to the reader."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(demo_model.path(), dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(demo_model.path())
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    chat = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=Image.open(ROOT / IMAGE), text=chat, return_tensors="pt")
    (line,) = re.findall(r"`(with reduce_tokens\(.*\):)`", README)
    names = {"model": model, "inputs": inputs, "reduce_tokens": reduce_tokens}
    exec(f"{line}\n    output = model.generate(**inputs, max_new_tokens=16)", names)
    answer = names["output"][0, inputs["input_ids"].shape[1] :]
    assert processor.decode(answer, skip_special_tokens=True).strip() == TRANSCRIPT.split()[0]


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


def test_advice_is_that_of_the_command() -> None:
    assert f"<!-- begin advice -->\n{as_markdown()}\n<!-- end advice -->" in README


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
