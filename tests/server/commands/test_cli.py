"""The command line: its lists, and its refusals before anything is loaded."""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ficoco_vllm import __version__
from ficoco_vllm.reduction import available
from ficoco_vllm.server.cli import main
from ficoco_vllm.server.commands.methods import _source
from ficoco_vllm.server.commands.serve import _use_demo_model
from ficoco_vllm.server.commands.serve_options import read_settings

ELASTIC = '{"floor": 64, "ceiling": 288}'


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"ficoco-vllm {__version__}\n"


def test_without_a_command_it_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "serve" in capsys.readouterr().out


def test_methods_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "SITE", "SOURCE", "TITLE"]
    assert sorted(line.split()[0] for line in lines[1:]) == sorted([*available(), "ficoco-vl"])
    assert all("arXiv:" in line for line in lines[1:])


def test_methods_shows_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "ficoco-v"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "0.35" in rows["lam"]
    assert "<= 1.0" in rows["lam"]
    assert "0.998" in rows["epsilon"]


@pytest.mark.parametrize(
    ("source", "printed"),
    [("2411.17686", "arXiv:2411.17686"), ("none", "none"), ("https://x.org/y", "https://x.org/y")],
)
def test_only_papers_are_printed_as_papers(source: str, printed: str) -> None:
    assert _source(source) == printed


def test_methods_refuses_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "magic"]) == 2
    assert "'magic'" in capsys.readouterr().err


def test_method_and_keep_win_over_the_file() -> None:
    config = '{"method": "tome", "keep": 9, "start_layer": 2}'
    assert read_settings(None, None, config) == {"method": "tome", "keep": 9, "start_layer": 2}
    assert read_settings("evit", "64", config) == {"method": "evit", "keep": 64, "start_layer": 2}
    assert read_settings(None, None, None) == {}


@pytest.mark.server
@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ficoco-method", "magic"], ["method = 'magic'", "allowed: ", "ficoco-v"]),
        (["--ficoco-keep", "0"], ["ficoco.keep = 0"]),
        (["--ficoco-keep", "many"], ["--ficoco-keep = 'many'", "an integer"]),
        (["--ficoco-keep", "577"], ["ficoco.keep = 577", "an integer from 1 to 576"]),
        (["--ficoco-config", "{"], ["--ficoco-config", "not valid JSON"]),
        (["--ficoco-config", '{"lam": 7}'], ["lam = 7", "<= 1"]),
        (["--ficoco-elastic", "{"], ["--ficoco-elastic = '{'", "not valid JSON", "floor"]),
        (["--ficoco-elastic", '{"floor": 64, "ceiling": 64}'], ["ceiling = 64", "above floor"]),
        (["--ficoco-elastic", ELASTIC], ["--ficoco-elastic needs a method"]),
        (
            ["--ficoco-method", "ficoco-v", "--ficoco-elastic", '{"floor": 64, "ceiling": 577}'],
            ["ceiling = 577", "at most 576"],
        ),
        (
            ["--ficoco-method", "tome", "--ficoco-elastic", '{"floor": 2, "ceiling": 288}'],
            ["--ficoco-elastic: the budget 2 of 2, 7, 24, 83, 288 cannot be served"],
        ),
        (
            ["--ficoco-method", "ficoco-v", "--ficoco-elastic", ELASTIC, "--disable-log-stats"],
            ["--disable-log-stats is not allowed with --ficoco-elastic"],
        ),
        (
            ["--ficoco-elastic", ELASTIC, "--ficoco-config", '{"method": "ficoco-l", "kv_budget": 450}'],
            ["kv_budget = 450", "--ficoco-elastic"],
        ),
        (["--ficoco-method", "trim"], ["trim", "text_relevance"]),
        (["--ficoco-min-keep", "0"], ["--ficoco-min-keep = '0'", "an integer of at least 1"]),
        (["--ficoco-max-image-pixels", "few"], ["--ficoco-max-image-pixels = 'few'", "at least 2"]),
        (["--ficoco-max-image-mb", "-1"], ["--ficoco-max-image-mb = '-1'", "an integer of at least 0"]),
        (["--ficoco-max-body-mb", "1.5"], ["--ficoco-max-body-mb = '1.5'", "an integer of at least 0"]),
        (["--ficoco-allow-methods", "tome,magic"], ["--ficoco-allow-methods = 'tome,magic'", "evit", "off"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_serve_refuses_in_one_line(
    arguments: list[str],
    parts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The command changes both, which later tests must not see.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["serve", *arguments]) == 2
    check_line(capsys.readouterr().err, parts)


@pytest.mark.server
def test_serve_refuses_an_unknown_architecture(tmp_path: Path) -> None:
    """In a separate process, as a user runs it: status 2, one line, no traceback."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = subprocess.run(
        [sys.executable, "-m", "ficoco_vllm.server.cli", "serve", str(tmp_path), "--ficoco-keep", "64"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    check_line(result.stderr, ["LlamaForCausalLM", "LlavaForConditionalGeneration"])


def check_line(stderr: str, parts: list[str]) -> None:
    """The error is one line."""
    (line,) = [line for line in stderr.splitlines() if line.startswith("ficoco-vllm: error: ")]
    for part in parts:
        assert part in line


def test_the_command_line_does_not_import_prometheus() -> None:
    """prometheus_client decides at import whether its counters are shared by processes; the server says so first."""
    code = "import sys, ficoco_vllm.server.cli; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


def test_what_a_command_started_ends_with_it(tmp_path: Path) -> None:
    """A benchmark that is stopped also stops its server."""
    code = f"""
import sys, time
from pathlib import Path
from ficoco_vllm.server import cli
from ficoco_vllm.server.commands import bench
from ficoco_vllm.benchmarks.harness.serving import running

def run(args):
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with running(sleeper, Path({str(tmp_path / "log")!r}), lambda: True) as child:
        print(child.pid, flush=True)
        time.sleep(600)

bench.run = run
sys.argv = ["ficoco-vllm", "bench", "load"]
sys.exit(cli.main())
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as command:
        assert command.stdout is not None
        child = int(command.stdout.readline())
        command.terminate()
        assert command.wait(60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.parametrize(
    ("requested", "on_cpu", "expected"),
    [("auto", True, "float32"), ("auto", False, "auto"), ("bfloat16", True, "bfloat16")],
)
def test_the_demo_model_is_computed_in_float32_on_cpus(
    monkeypatch: pytest.MonkeyPatch, requested: str, on_cpu: bool, expected: str
) -> None:
    """Its weights are bfloat16, whose products are slow on some CPUs and rounded differently on others."""
    monkeypatch.setattr("ficoco_vllm.server.commands.serve.is_cpu_build", lambda: on_cpu)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = argparse.Namespace(
        model_tag=None,
        served_model_name=None,
        kv_cache_memory_bytes=None,
        enforce_eager=False,
        dtype=requested,
    )
    _use_demo_model(args)
    assert args.dtype == expected
