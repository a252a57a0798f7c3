"""The command line: its lists, and its refusals before anything is loaded."""

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm import __version__
from ficoco_vllm.benchmarks.accuracy.client import Host
from ficoco_vllm.config import DEFAULT_METHOD
from ficoco_vllm.demo_model import examples
from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.advice import ADVICE, TITLE, as_markdown
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.reduction.registry import names
from ficoco_vllm.server.cli import COMMANDS, command, main, make_parser
from ficoco_vllm.server.commands import serve
from ficoco_vllm.server.commands.completion import SHELLS
from ficoco_vllm.server.commands.methods import _meanings, _source
from ficoco_vllm.server.commands.preflight import method_names
from ficoco_vllm.server.commands.serve import (
    _in_words,
    _use_demo_model,
    _vllm_parser,
    configure,
    resolve_settings,
)
from ficoco_vllm.server.commands.serve_options import load_config, read_options, read_settings

ROOT = Path(__file__).parents[3]
ELASTIC = '{"floor": 64, "ceiling": 288}'
TARGET = ["--ficoco-method", "ficoco-v", "--ficoco-target-agreement"]


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
    printed = capsys.readouterr().out
    assert printed.startswith(TITLE)
    lines = printed.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("NAME"))
    assert lines[start].split() == ["NAME", "SITE", "SERVED", "SOURCE", "TITLE"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[start + 1 : lines.index("", start)]}
    assert sorted(rows) == sorted(names())
    refused = {name for name, row in rows.items() if row[1] == "no"}
    assert refused == {"downscale"}
    assert "downscale needs a model with dynamic resolution" in printed
    assert rows["best"][2:4] == ["no", "paper"]
    assert rows["ficoco-v"][2] == "arXiv:2411.17686"


def test_the_advice_repeats_what_was_measured() -> None:
    """Points that a method loses of the demo model's correct answers, from the published table."""
    page = (ROOT / "docs" / "accuracy.md").read_text()
    losses = {
        name: [float(change) for change in re.findall(r"\(([-+0-9.]+):", row)]
        for name, row in re.findall(
            r"^\| `([a-z-]+)` \| (?:tower|decoder|both) \| (.*\(.*) \|$", page, re.MULTILINE
        )
    }
    known = {advice.methods[0]: advice.known for advice in ADVICE[:3]}
    assert losses["divprune"] == [-0.5, 0, 0, 0]
    assert "Loses at most 1 point at 288 to 64" in known["divprune"]
    assert [round(-value) for value in losses["tome"]] == [0, 0, 1, 6]
    assert "loses 0 points at 192 tokens, 6 at 64" in known["tome"]
    last = {name: round(-row[3]) for name, row in losses.items()}
    said = "`ficoco-v` loses {ficoco-v} points at 64 tokens, `ficoco-l` {ficoco-l}, `ficoco-vl` {ficoco-vl};"
    for name in ("ficoco-v", "ficoco-l", "ficoco-vl"):
        said = said.replace(f"{{{name}}}", str(last[name]))
    assert said in known["ficoco-v"]
    assert f"`best`, a composition tuned on this model, loses {last['best']}." in known["ficoco-v"]
    assert {name for advice in ADVICE for name in advice.methods} <= {*available(), *PIPELINES}
    assert ADVICE[0].methods[0] == DEFAULT_METHOD
    assert as_markdown().count("\n") == len(ADVICE) + 1


def test_methods_shows_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "ficoco-v"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "0.35" in rows["lam"]
    assert "<= 1.0" in rows["lam"]
    assert "0.998" in rows["epsilon"]


def test_methods_shows_a_control(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "downscale"]) == 0
    printed = capsys.readouterr().out
    assert "no reduction, the image is shrunk" in printed
    assert "site     image" in printed
    assert "arXiv:2510.07143" in printed


def test_methods_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for name in available():
        settings = get(name).settings
        meanings = _meanings(settings)
        assert set(settings.model_fields) <= set(meanings), name
        # No meaning needs the equation beside it.
        assert not re.search(
            r"\b(first|second) term\b|the scores as they are", " ".join(meanings.values())
        ), name
    assert main(["methods", "ficoco-v"]) == 0
    assert "rows and columns of a window" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "printed"),
    [("2411.17686", "arXiv:2411.17686"), ("none", "no paper"), ("https://x.org/y", "https://x.org/y")],
)
def test_only_papers_are_printed_as_papers(source: str, printed: str) -> None:
    assert _source(source) == printed


def test_methods_refuses_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "magic"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"method = 'magic' is not a known method; allowed: {', '.join(names())}")


def test_method_and_keep_win_over_the_file() -> None:
    config = '{"method": "tome", "keep": 9, "start_layer": 2}'
    assert read_settings(None, None, config) == {"method": "tome", "keep": 9, "start_layer": 2}
    assert read_settings("evit", "64", config) == {"method": "evit", "keep": 64, "start_layer": 2}
    assert read_settings(None, None, None) == {}
    assert read_settings(None, None, config, "0.5") == {"method": "tome", "keep_ratio": 0.5, "start_layer": 2}
    assert read_settings(None, "64", '{"keep_ratio": 0.5}') == {"keep": 64}
    assert read_settings(None, "64", None, "0.5") == {"keep": 64, "keep_ratio": 0.5}  # refused as a pair


def test_a_text_encoder_belongs_to_the_settings() -> None:
    settings, *_ = resolve_settings(
        read_options(["--ficoco-method", "trim", "--ficoco-text-encoder", "clip", "--ficoco-keep", "9"])
    )
    assert settings == {"method": "trim", "keep": 9, "text_encoder": "clip"}


def test_a_budget_replaces_those_of_lower_levels() -> None:
    below = ["--additional-config", '{"ficoco": {"method": "divprune", "keep_ratio": 0.5}}']
    settings, *_ = resolve_settings(read_options([*below, "--ficoco-config", '{"keep": 9}']))
    assert settings == {"method": "divprune", "keep": 9}
    settings, *_ = resolve_settings(read_options([*below, "--ficoco-keep-ratio", "0.25"]))
    assert settings == {"method": "divprune", "keep_ratio": 0.25}


def test_a_share_beside_the_load_is_refused_by_name() -> None:
    options = ["--ficoco-method", "divprune", "--ficoco-keep-ratio", "0.25"]
    options += ["--ficoco-elastic", '{"floor": 64, "ceiling": 288}']
    with pytest.raises(ValueError, match=r"keep_ratio = 0.25 is not allowed with --ficoco-elastic"):
        resolve_settings(read_options(options))


def test_config_as_text_and_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"keep": 64}))
    assert load_config(str(file)) == load_config('{"keep": 64}') == {"keep": 64}


@pytest.mark.parametrize("text", ['{"keep": 64', "[64]", "/nowhere/settings.json", "{}}"])
def test_config_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="--ficoco-config"):
        load_config(text)


def test_config_refuses_a_list_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text("[64]")
    with pytest.raises(ValueError, match="holds list, not a JSON object"):
        load_config(str(file))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--ficoco-method", "magic"], ["method = 'magic'", "allowed: ", "ficoco-v"]),
        (["--ficoco-keep", "0"], ["ficoco.keep = 0 is not allowed; allowed: an integer from 1 to 576"]),
        (["--ficoco-config", '{"keep": 64.5}'], ["ficoco.keep = 64.5", "an integer from 1 to 576"]),
        (["--ficoco-method", "ficoco-l", "--ficoco-keep", "577"], ["ficoco.keep = 577", "from 1 to 576"]),
        (["--ficoco-keep", "-3"], ["ficoco.keep = -3 is not allowed; allowed: an integer from 1 to 576"]),
        (
            ["--ficoco-keep", "64.5"],
            ["ficoco.keep = '64.5' is not allowed; allowed: an integer from 1 to 576"],
        ),
        (
            ["--ficoco-keep", "many"],
            ["ficoco.keep = 'many' is not allowed; allowed: an integer from 1 to 576"],
        ),
        (["--ficoco-keep", "577"], ["ficoco.keep = 577", "an integer from 1 to 576"]),
        (["--ficoco-config", "{"], ["--ficoco-config", "not valid JSON"]),
        (["--ficoco-config", '{"method": "ficoco-v", "lam": 7}'], ["lam = 7", "<= 1"]),
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
        (
            [*TARGET, "1.5"],
            ["quality.target_agreement = 1.5 is not allowed; allowed: a number above 0, below 1"],
        ),
        ([*TARGET, "abc"], ["--ficoco-target-agreement = 'abc' is not allowed", "above 0, below 1"]),
        (
            [*TARGET, "0.9", "--ficoco-config", '{"quality": {"ladder": [64, 32]}}'],
            ["quality.ladder = [64, 32] is not allowed; allowed: increasing integers"],
        ),
        (
            [*TARGET, "0.9", "--ficoco-config", '{"quality": {"ladder": [64, 577]}}'],
            ["quality.ladder = [64, 577] is not allowed", "from 1 to 576"],
        ),
        ([*TARGET, "0.9", "--ficoco-keep", "64"], ["keep = 64 is not allowed", "a ladder of budgets"]),
        ([TARGET[-1], "0.9"], ["--ficoco-target-agreement needs a method", "--ficoco-method"]),
        (
            [*TARGET, "0.9", "--disable-log-stats"],
            ["--disable-log-stats is not allowed with --ficoco-target-agreement"],
        ),
        (
            [*TARGET, "0.9", "--ficoco-allow-methods", "tome"],
            ["--ficoco-allow-methods = 'tome' is not allowed with --ficoco-target-agreement", "off among"],
        ),
        (
            [*TARGET, "0.9", "--logprobs-mode", "processed_logprobs"],
            ["--logprobs-mode = 'processed_logprobs' is not allowed", "allowed: raw_logprobs"],
        ),
        (["--ficoco-min-keep", "0"], ["--ficoco-min-keep = '0'", "an integer of at least 1"]),
        (["--ficoco-max-image-pixels", "few"], ["--ficoco-max-image-pixels = 'few'", "at least 2"]),
        (["--ficoco-max-image-mb", "-1"], ["--ficoco-max-image-mb = '-1'", "an integer of at least 0"]),
        (["--ficoco-max-body-mb", "1.5"], ["--ficoco-max-body-mb = '1.5'", "an integer of at least 0"]),
        (
            ["--ficoco-method", "tome", "--ficoco-explain", "--ficoco-explain-rate", "-1"],
            ["--ficoco-explain-rate = '-1' is not allowed; allowed: an integer of at least 0"],
        ),
        (["--ficoco-explain-rate", "often"], ["--ficoco-explain-rate = 'often'", "an integer of at least 0"]),
        (["--ficoco-explain-rate", "9"], ["--ficoco-explain-rate = '9'", "without --ficoco-explain"]),
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
    # A command that is not refused must not start a server.
    monkeypatch.setattr(serve, "_start", lambda *given: 0)
    # The command changes both, which later tests must not see.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert main(["serve", "--port", "0", *arguments]) == 2
    check_line(capsys.readouterr().err, parts)


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
    """prometheus_client decides at import whether processes share its counters; the server decides before that."""
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


def test_a_command_that_sends_requests_ends_without_a_traceback() -> None:
    """The signal finds one of several tasks at work."""
    code = """
import asyncio, sys, time
from ficoco_vllm.server import cli
from ficoco_vllm.server.commands import bench

async def ask():
    while True:
        print("at work", flush=True)
        time.sleep(0.05)
        await asyncio.sleep(0)

async def ask_all():
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(ask())

bench.run = lambda args: asyncio.run(ask_all())
sys.argv = ["ficoco-vllm", "bench", "load"]
sys.exit(cli.main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as command:
        assert command.stdout is not None
        command.stdout.readline()
        command.terminate()
        _, errors = command.communicate(timeout=60)
    assert (command.returncode, errors) == (128 + signal.SIGTERM, "")


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
        model=None,
        served_model_name=None,
        kv_cache_memory_bytes=None,
        enforce_eager=False,
        dtype=requested,
    )
    _use_demo_model(args)
    assert args.dtype == expected
    if requested == "auto":
        monkeypatch.setattr("ficoco_vllm.benchmarks.accuracy.client.is_cpu_build", lambda: on_cpu)
        assert Host().dtype == (None if expected == "auto" else expected), "the benchmark's result says so"


@pytest.mark.parametrize(
    ("arguments", "policy", "words"),
    [
        ([*TARGET, "0.9"], "priority", "holds an agreement of 0.9 with the full model"),
        (
            [*TARGET, "0.9", "--ficoco-elastic", ELASTIC],
            "priority",
            f"holds an agreement of 0.9 with the full model or, where that is larger, a budget that follows the load: "
            f"{ELASTIC}",
        ),
        ([*TARGET[:2], "--ficoco-elastic", ELASTIC], "fcfs", f"a budget that follows the load: {ELASTIC}"),
        ([*TARGET[:2], "--ficoco-keep", "64"], "fcfs", "ficoco-v keeps 64 of 576 visual tokens of an image"),
    ],
    ids=["target", "both", "load", "neither"],
)
def test_a_target_sorts_by_priority_and_is_named_when_the_server_is_ready(
    arguments: list[str], policy: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))
    args = _vllm_parser().parse_args(arguments)
    plan = configure(args)
    assert args.scheduling_policy == policy
    assert _in_words(plan, args).endswith(words)


def test_mistakes_are_refused_before_anything_is_imported(tmp_path: Path) -> None:
    """Port, model, method and budget without torch, the rest without vLLM: each in less than two seconds of work."""
    (tmp_path / "empty").mkdir()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = f"""
import os, sys, time
from ficoco_vllm.server.cli import main

def refused(*words):
    start = time.process_time()
    assert main(["serve", *words]) == 2, words
    assert time.process_time() - start < 2, words

refused("--port", "{port}", "--host", "127.0.0.1")
refused("--port={port}", "--ficoco-keep", "64")
refused("--port", "many")
refused("--host", "198.51.100.7")
refused("/no/such/model")
refused("{tmp_path}/empty")
refused("--model", "{tmp_path}/empty")
os.environ["HF_HUB_OFFLINE"] = "1"
refused("someone/never-downloaded")
refused("--ficoco-method", "magic")
refused("--ficoco-config", '{{"method": "magic"}}')
refused("--ficoco-keep", "577")
refused("--ficoco-keep", "0")
refused("--ficoco-keep", "64.5")
refused("--prot", "3")
refused("--prot=3", "--ficoco-keep", "64")
refused("--bogus-option", "3")
assert "torch" not in sys.modules
import torch  # takes one to three seconds of its own, which are not counted
refused("--ficoco-config", '{{"method": "ficoco-v", "lam": 2}}')
target = ("--ficoco-method", "ficoco-v", "--ficoco-target-agreement", "0.9")
refused(*target, "--ficoco-config", '{{"quality": {{"ladder": [64, 577]}}}}')
assert not {{"vllm", "transformers"}} & set(sys.modules)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("ficoco-vllm: error: ") for line in lines)
    assert len(lines) == 18
    assert f"--port = {port} cannot be used on 127.0.0.1 (Address already in use)" in lines[0]
    assert "does not exist" in lines[4]
    assert "without config.json" in lines[5]
    assert "HF_HUB_OFFLINE=1 allows no download, while the cache" in lines[7]
    assert all("--prot is not an option; allowed: --port" in line for line in lines[13:15])
    assert "--bogus-option is not an option" in lines[15]


@pytest.mark.parametrize(
    "words",
    [
        ["methods", "magic"],
        ["plan", "--method", "magic"],
        ["plan", "--keep", "64", "--method=magic"],
        ["explain", "image.png", "what?", "--out", "out.png", "--method", "magic"],
        ["bench", "accuracy", "--methods", "tome,magic"],
        ["calibrate", "--methods", "magic", "--data", "images"],
        ["replay", "--data", "log.jsonl", "--method", "magic"],
    ],
)
def test_an_unknown_method_is_refused_before_torch_is_imported(words: list[str]) -> None:
    code = f"""
import sys
from ficoco_vllm.server.cli import main
assert main({words}) == 2
assert not {{"torch", "vllm"}} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    check_line(done.stderr, [f"method = 'magic' is not a known method; allowed: {names()[0]}, ", "ficoco-vl"])


def test_a_method_of_a_server_elsewhere_is_that_server_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next(iter(examples())).image
    words = ["explain", str(image), "what?", "--out", str(tmp_path / "out.png"), "--method", "theirs"]
    assert main([*words, "--url", "http://127.0.0.1:9"]) == 1
    check_line(capsys.readouterr().err, ["http://127.0.0.1:9"])


def test_names_of_methods_are_known_without_torch() -> None:
    assert method_names() == tuple(sorted(names()))


@pytest.mark.parametrize("words", [["--help"], ["serve", "--help"], ["serve", "--ficoco-keep", "64", "-h"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from ficoco_vllm.server.cli import main
try:
    main({words})
finally:
    print([name for name in ("torch", "vllm", "pydantic", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    *lines, imported = done.stdout.splitlines()
    assert imported == "[]"
    if "serve" in words:
        first = next(line for line in lines if line.startswith("  --"))
        assert first.startswith("  --ficoco-method")
        assert "--help=all" in done.stdout
    assert "None" not in done.stdout


def test_the_list_of_commands_is_that_of_their_modules() -> None:
    parser = make_parser([])
    listed = next(action for action in parser._actions if isinstance(action.choices, dict))
    for name, line in COMMANDS.items():
        assert name in listed.choices
        if name != "serve":
            (own,) = _SubparserHelp.of(command(name))
            assert own == line


class _SubparserHelp:
    """Stands in for argparse's list of commands and records their lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add_parser(self, name: str, help: str, **rest: object) -> argparse.ArgumentParser:
        self.lines.append(help)
        return argparse.ArgumentParser()

    @classmethod
    def of(cls, module: Any) -> list[str]:
        recorder = cls()
        module.add_parser(recorder)
        return recorder.lines


def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ficoco_vllm", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"ficoco-vllm {__version__}\n"


def test_a_closed_pipe_is_no_traceback() -> None:
    done = subprocess.run(
        f"set -o pipefail; {sys.executable} -m ficoco_vllm methods | true",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_commands_options_and_methods(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for word in (
        *COMMANDS,
        "--ficoco-method",
        "--ficoco-keep",
        "--tensor-parallel-size",
        "divprune",
        "ficoco-vl",
    ):
        assert word in text


def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    for words, expected in (
        (["ficoco-vllm", "pl"], "plan"),
        (["ficoco-vllm", "serve", "--ficoco-keep-"], "--ficoco-keep-ratio"),
        (["ficoco-vllm", "serve", "--ficoco-method", "divp"], "divprune"),
    ):
        code = f"""
source {tmp_path}/completion
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}
_shtab_ficoco_vllm
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == [expected], done.stderr
