"""All spellings that vLLM's parser accepts are read alike by vLLM and by our light parser before vLLM is imported."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ficoco_vllm import demo_model
from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.server.cli import main
from ficoco_vllm.server.commands import serve, vllm_options
from ficoco_vllm.server.commands.vllm_options import TABLE, merged, vllm_table

MODEL = str(demo_model.path())
# Options of vLLM: name, value on the command line, value in the namespace.
VLLM = {"port": 12321, "dtype": "float32", "seed": 7, "served_model_name": ["a", "b"], "headless": True}
OURS = {"method": "ficoco-l", "keep": 64, "num_segments": 2, "backend": "torch"}


@pytest.mark.compat
def test_the_table_has_the_options_of_the_installed_vllm() -> None:
    """Written by `python -m ficoco_vllm.server.commands.vllm_options`."""
    table = json.loads(TABLE.read_text())
    assert merged(table, vllm_table()) == table
    options = [name for options in table.values() for option in options for name in option.split()]
    assert len(options) == len({*options}), "an option takes another number of values in another version"


@cache
def full_parser() -> Any:
    return serve._vllm_parser()


@contextmanager
def yaml_file(values: dict[str, Any]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        yield file.name


def started_with(patch: pytest.MonkeyPatch) -> list[Any]:
    """Arguments, options and settings of each server that would start."""
    started: list[Any] = []

    def start(*given: Any) -> int:
        started.append(given)
        return 0

    patch.setattr(serve, "_start", start)
    patch.setattr(serve, "check_port", lambda options: None)
    return started


@st.composite
def option(draw: st.DrawFn, name: str, value: Any, short: str | None = None) -> list[str]:
    """One option on the command line: dashes or underscores, abbreviated, `=` or a space."""
    spelled = draw(st.sampled_from([name, name.replace("_", "-"), *([short] if short else [])]))
    if value is True:
        return [f"--{spelled}"]
    if isinstance(value, list):
        return [f"--{spelled}", *value]
    return [f"--{spelled}={value}"] if draw(st.booleans()) else [f"--{spelled}", str(value)]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Words after `serve`, the content of its YAML file, and what they mean."""
    words: list[str] = []
    file: dict[str, Any] = {}
    meant: dict[str, Any] = {}
    for name in draw(st.sets(st.sampled_from(sorted(VLLM)))):
        meant[name] = VLLM[name]
        if draw(st.booleans()):
            file[draw(st.sampled_from([name, name.replace("_", "-")]))] = VLLM[name]
        else:
            words += draw(option(name, VLLM[name]))
    names = draw(st.sets(st.sampled_from(sorted(OURS))))
    chosen = {name: OURS[name] for name in (names | {"method"} if names else ())}
    # Method and budget are options; the rest, and they too, may come in three other ways.
    left = dict(chosen)
    for name, short in (("method", "ficoco-me"), ("keep", None)):
        if name in left and draw(st.booleans()):
            value = left.pop(name)
            if draw(st.booleans()):
                file[draw(st.sampled_from([f"ficoco-{name}", f"ficoco_{name}"]))] = value
            else:
                words += draw(option(f"ficoco_{name}", value, short))
    way = draw(st.sampled_from(["additional", "dotted", "config", "dotted config", "file"]))
    if left and way == "additional":
        words += draw(option("additional_config", json.dumps({"other": 1, "ficoco": left})))
    elif way == "dotted":
        for name, value in left.items():
            words += draw(option("additional_config", "")).pop(0).partition("=")[:1]
            words[-1] += f".ficoco.{name}"
            words.append(str(value))
    elif left and way == "config":
        words += draw(option("ficoco_config", json.dumps(left)))
    elif way == "dotted config":
        for name, value in left.items():
            words += [f"--ficoco-config.{name}={value}"]
    elif left:
        file["additional-config"] = {"ficoco": left}
    model = draw(st.sampled_from([None, "first", "option", "file"]))
    if model == "file":
        file["model"] = MODEL
    elif model == "option":
        words += draw(option("model", MODEL))
    explain = draw(st.booleans()) and bool(chosen)
    if explain:
        words += draw(option("ficoco_explain", True))
    if model == "first":
        words.insert(0, MODEL)
    meant |= {"model": None if model is None else MODEL}
    return words, file, {"vllm": meant, "settings": {**chosen, **({"explain": True} if explain else {})}}


@given(command_lines(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_all_spellings_mean_the_same(
    line: tuple[list[str], dict[str, Any], dict[str, Any]], joined: bool
) -> None:
    words, file, meant = line
    with yaml_file(file) as name, pytest.MonkeyPatch.context() as patch:
        if file:
            words = [*words, f"--config={name}"] if joined else [*words, "--config", name]
        started = started_with(patch)
        assert main(["serve", *words]) == 0
        ((expanded, options, found),) = started
        args = full_parser().parse_args(expanded)
    assert found == meant["settings"]
    assert serve.resolve_settings(args)[0] == meant["settings"]
    for parsed in (options, args):
        check(parsed, meant["vllm"])


def check(parsed: argparse.Namespace, meant: dict[str, Any]) -> None:
    """A namespace holds the values, as text or converted."""
    assert (parsed.model_tag or parsed.model) == meant["model"]
    for name, value in meant.items():
        if name != "model":
            read = getattr(parsed, name)
            assert (read if isinstance(value, bool | list) else str(read)) == (
                value if isinstance(value, bool | list) else str(value)
            )


@pytest.mark.parametrize(
    "words",
    [
        ["--ficoco_method", "ficoco-l"],
        ["--ficoco-meth", "ficoco-l"],
        ["--additional-config.ficoco.method", "ficoco-l"],
        ["--additional_config.ficoco.method=ficoco-l"],
        ["--additional-config", '{"ficoco": {"method": "ficoco-l"}}'],
        ["--additional-config.ficoco.method", "ficoco-l", "--ficoco-keep", "64"],
        ["--served-model-name", "x", "--ficoco-config.method", "ficoco-l"],
    ],
)
def test_a_method_of_the_decoder_is_known_before_vllm_is_imported(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment says decides about Triton and shared metrics when vLLM is imported."""
    started = started_with(monkeypatch)
    assert main(["serve", *words]) == 0
    assert FicocoConfig.parse(started[0][2]).decoder_method is not None


@pytest.mark.parametrize("joined", [True, False])
def test_a_model_in_a_file_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], joined: bool
) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("model: /no/such/model\nficoco-method: ficoco-v\nserved-model-name: mine\n")
    assert main(["serve", *([f"--config={file}"] if joined else ["--config", str(file)])]) == 2
    assert "model = '/no/such/model' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--config", "/no/such.yaml"], "/no/such.yaml"),
        (["--additional-config.ficoco.method"], "cannot be read"),
        (["--additional-config", "[1"], "--additional-config = '[1' is not valid JSON"),
        (["--additional-config", '{"ficoco": 3}'], "ficoco = 3"),
        (["--ficoco-metod", "tome"], "--ficoco-metod is not an option; allowed: --ficoco-method"),
        (["--ficoco_keeps=3"], "--ficoco-keeps is not an option; allowed: --ficoco-keep"),
        (["--prot", "3"], "--prot is not an option; allowed: --port"),
        (["--prot=3"], "--prot is not an option; allowed: --port"),
        (
            ["/no/such/model", "--tensor_paralel_size", "2"],
            "--tensor-paralel-size is not an option; allowed: --t",
        ),
        (["-tpp", "2"], "-tpp is not an option; allowed: -tp"),
        (
            ["--aditional-config.ficoco.keep", "9"],
            "--aditional-config is not an option; allowed: --additional-c",
        ),
        (
            ["--bogus-option", "3"],
            "--bogus-option is not an option; allowed: those that ficoco-vllm serve --help=all",
        ),
    ],
)
def test_what_cannot_be_read_is_refused(
    words: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize(
    "words",
    [
        ["--prot", "8001"],  # of the newer version: all is left to vLLM's parser
        ["--additional-config.a.b", "3", "--kv_transfer_config.kv_role=both"],
        ["--max-num-b", "4096", "-O3", "-tp", "1"],
    ],
)
def test_options_that_vllm_may_know_are_left_to_it(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started = started_with(monkeypatch)
    newer = words[0] == "--prot"
    if newer:
        monkeypatch.setattr(vllm_options, "installed_version", lambda: "0.34.0")
    assert main(["serve", MODEL, *words]) == 0
    assert started[0][1].unknown == (["--prot", "8001"] if newer else [])


def test_without_a_model_the_demo_model_is_served_under_the_given_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    args = full_parser().parse_args(["--served-model-name", "x"])
    assert args.model is args.model_tag is None
    serve._use_demo_model(args)
    assert (args.model_tag, args.served_model_name) == (MODEL, ["x"])
    help_text = full_parser().format_help()
    assert "None)" not in help_text
