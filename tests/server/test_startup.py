"""Output of `ficoco-vllm serve`: progress, one block whose statements hold, and no warning to be ignored."""

import argparse
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import httpx
import pytest

from ficoco_vllm.environment import ENDPOINT_PLUGIN
from ficoco_vllm.server.lifecycle.quiet import HIDDEN, hide
from ficoco_vllm.server.lifecycle.ready import block
from tests.support.server import API_KEY, Server


@pytest.fixture
def log(server: Server) -> str:
    """Output of the server up to the end of its block, printed a moment after the first answer."""
    deadline = time.monotonic() + 30
    while "  try  " not in (text := server.log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.1)
    return text


@pytest.mark.server
def test_the_log_is_short_and_clean(log: str) -> None:
    before, _, _ = log.partition("ficoco-vllm is ready")
    lines = [line for line in before.splitlines() if not line.startswith("INFO:  ")]  # of requests
    assert len(lines) <= 30  # with 22 at the time of writing; stock vLLM writes 173
    assert "importing vLLM" in lines[0]
    assert any("starting the engine" in line for line in lines)
    strange = [line for line in lines if line.strip() and not line.startswith("ficoco-vllm: ")]
    assert all("Loading safetensors" in line for line in strange)
    assert not re.search("warning|nanobind|Triton", before, re.IGNORECASE)


@pytest.mark.server
def test_the_block_is_true(log: str, server: Server) -> None:
    assert log.count("ficoco-vllm is ready after") == 1
    rows = dict(re.findall(r"^  (URL|model|method|page|metrics|try) +(.*)$", log, re.MULTILINE))
    assert rows["URL"] == f"{server.url}/v1"
    assert rows["model"].startswith("ficoco-demo (")
    assert rows["method"] == "ficoco-v keeps 64 of 576 visual tokens of an image"
    for page in ("page", "metrics"):
        assert httpx.get(rows[page]).status_code == 200
    done = subprocess.run(
        ["bash", "-c", rows["try"]],
        env={**os.environ, "VLLM_API_KEY": API_KEY},
        capture_output=True,
        text=True,
        check=True,
    )
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip().isdigit()
    assert answer["usage"]["ficoco"]["visual_tokens_kept"] == 64


@pytest.mark.compat
def test_what_is_hidden_is_what_the_installed_packages_say() -> None:
    """A text that has changed would be shown again, or hide nothing for ever."""
    for name, texts in HIDDEN.items():
        package, *rest = name.split(".")
        folder = importlib.util.find_spec(package).submodule_search_locations[0]
        path = Path(folder, *rest).with_suffix(".py")
        # `uvicorn.error` is a name that no file has; its texts are in the server.
        files = [path] if path.is_file() else list(Path(folder).rglob("*.py"))
        source = re.sub(r'"\s*f?"', "", "".join(file.read_text() for file in files))
        for text in texts:
            assert text in source, (name, text)


@pytest.mark.compat
@pytest.mark.parametrize(("others", "shown"), [([], 0), (["theirs"], 1)])
def test_an_endpoint_that_is_left_out_is_reported_unless_it_is_ours(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, others: list[str], shown: int
) -> None:
    """A server without our settings is stock vLLM, which warns about every endpoint that is not listed."""
    import vllm.plugins

    # The environment may be read no more: an engine in this process lets vLLM remember it.
    monkeypatch.setitem(vars(vllm.plugins.envs), "VLLM_PLUGINS", None)
    entries = [EntryPoint(name, "nowhere", "vllm.endpoint_plugins") for name in [ENDPOINT_PLUGIN, *others]]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    logger, output = logging.getLogger("vllm.plugins"), io.StringIO()
    handler = logging.StreamHandler(output)
    monkeypatch.setattr(logger, "filters", [])
    monkeypatch.setattr(logger, "handlers", [handler])
    hide()
    with caplog.at_level(logging.WARNING, logger.name):  # other tests silence vLLM
        assert vllm.plugins.load_endpoint_plugins() == []
    assert output.getvalue().count("Found endpoint plugin") == shown


def test_what_is_printed_after_the_end_of_python_is_hidden() -> None:
    """Exit handlers run in reverse order: one that was registered before stands in for Triton's bindings."""
    code = """
import atexit, os, sys
from ficoco_vllm.server.lifecycle.quiet import end_quietly
atexit.register(os.write, 2, b"leaked")
end_quietly()
end_quietly()
atexit.register(os.write, 2, b"shown")
sys.exit(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (3, "shown")


def test_a_command_ends_without_the_end_of_python() -> None:
    code = """
import atexit, os, sys
from ficoco_vllm.server import cli
sys.argv = ["ficoco-vllm", "completion", "bash"]
atexit.register(os.write, 2, b"leaked")
sys.exit(cli.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ficoco" in done.stdout


def test_the_block_names_the_page_or_how_to_get_one() -> None:
    names = ("host", "uds", "ssl_certfile", "served_model_name", "api_key")
    args = argparse.Namespace(port=8000, model="m", ficoco_explain=True, **dict.fromkeys(names))
    assert "  page     http://localhost:8000/ficoco/" in block(args, "tome", 1)
    args.ficoco_explain = False
    assert "  page     none; --ficoco-explain" in block(args, "tome", 1)
