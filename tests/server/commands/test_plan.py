"""The `plan` subcommand: its figures, its JSON, its errors, and that it needs neither vLLM nor weights."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.config import DEFAULT_METHOD, FicocoConfig
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import available, get
from ficoco_vllm.reduction.cost import KNOWN_MODELS, Device
from ficoco_vllm.reduction.pipeline import PIPELINES
from ficoco_vllm.server.commands import plan

LLAVA_7B = "llava-hf/llava-1.5-7b-hf"
NEXT_7B = "llava-hf/llava-v1.6-vicuna-7b-hf"


def run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    return plan.run(parser.parse_args(["plan", *options]))


def report(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert run(*options, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    parsed: dict[str, Any] = json.loads(printed.out)
    return parsed


# The paper prints one digit. At 64 tokens its figure is that of 56 (docs/paper-tables.md, note a).
@pytest.mark.parametrize(
    ("keep", "tflops", "tolerance"), [(64, 1.5, 0.08), (128, 2.4, 0.03), (192, 3.3, 0.01)]
)
def test_the_papers_settings(
    capsys: pytest.CaptureFixture[str], keep: int, tflops: float, tolerance: float
) -> None:
    plan = report(capsys, LLAVA_7B, "--method", "ficoco-v", "--keep", str(keep), "--text-tokens", "60")
    assert plan["reduced"]["decoder_flops"] / 1e12 == pytest.approx(tflops, rel=tolerance)
    assert plan["unreduced"]["decoder_flops"] / 1e12 == pytest.approx(8.5, rel=0.01)
    assert plan["decoder_visual_tokens"] == [keep] * 33
    assert plan["encoder_tokens"][:12] == [576] * 12
    assert plan["encoder_tokens"][-1] == keep


def test_the_json_is_stable(capsys: pytest.CaptureFixture[str]) -> None:
    """A change here breaks readers of the JSON: raise JSON_SCHEMA with it."""
    parsed = report(capsys, LLAVA_7B, "--keep", "64", "--images", "2", "--dtype", "int8")
    assert parsed["schema"] == 1
    assert list(parsed) == [
        "schema",
        "model",
        "method",
        "num_text_tokens",
        "num_images",
        "dtype",
        "num_patches",
        "patches_per_token",
        "encoder_tokens",
        "decoder_visual_tokens",
        "mean_visual_tokens",
        "reduced",
        "unreduced",
        "prefill_speedup",
    ]
    costs = {
        "tower_flops",
        "projector_flops",
        "decoder_flops",
        "reduction_flops",
        "kv_bytes_per_layer",
        "weight_bytes",
        "activation_bytes",
        "llm_traffic_bytes",
        "total_flops",
        "kv_bytes",
        "memory_bytes",
    }
    assert set(parsed["reduced"]) == set(parsed["unreduced"]) == costs
    assert set(parsed["prefill_speedup"]) == {"compute_bound", "memory_bound"}
    # Two images of 64 tokens, 60 text tokens, keys and values of 4096 numbers of one byte each.
    assert parsed["reduced"]["kv_bytes_per_layer"] == [(2 * 64 + 60) * 2 * 4096] * 32
    assert parsed["reduced"]["kv_bytes"] == 32 * (2 * 64 + 60) * 2 * 4096


def test_the_table_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LLAVA_7B, "--method", "ficoco-v", "--keep", "64") == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    for row in (
        ["layers", "0-11", "576"],
        ["layer", "12", "533"],
        ["layers", "0-31", "64"],
        ["LLM", "prefill,", "TFLOPs", "8.450", "1.614"],
        ["KV", "cache,", "MB", "333.447", "65.012"],
    ):
        assert row in cells


@pytest.mark.parametrize("method", [*available(), "ficoco-vl"])
def test_what_cannot_be_served_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """All methods of the package are served; one of a user's may read a signal that its site does not have."""
    assert run(LLAVA_7B, "--method", method, "--keep", "64") == 0
    assert "No server can run this" not in capsys.readouterr().out
    monkeypatch.setattr("ficoco_vllm.server.commands.plan.obstacle", lambda name: f"{name} needs more")
    assert run(LLAVA_7B, "--method", method, "--keep", "64") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"No server can run this: {method} needs more."


def test_every_method_has_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """Every method keeps `keep` tokens, and removes tokens at its own site."""
    for name in available():
        parsed = report(capsys, LLAVA_7B, "--method", name, "--keep", "64")
        in_tower, in_decoder = parsed["encoder_tokens"], parsed["decoder_visual_tokens"]
        site = get(name).site
        assert in_decoder[-1] == 64
        assert (in_tower[-1] < 576) == (site == "encoder")
        assert (in_decoder[0] == 576) == (site == "decoder")


@pytest.mark.parametrize(
    ("options", "encoder", "decoder"),
    [
        (["--schedule", "11:300,20:64"], [576] * 12 + [300] * 9 + [64] * 3, [64] * 33),
        (["--keep", "64", "--schedule", "one-shot"], [576] * 12 + [64] * 12, [64] * 33),
        (["--keep", "64", "--schedule", "one-shot", "--start-layer", "20"], [576] * 21 + [64] * 3, [64] * 33),
        (["--kv-budget", "64", "--schedule", "one-shot"], [576] * 12 + [64] * 12, [64] * 33),
        (
            ["--method", "ficoco-l", "--keep", "64", "--schedule", "one-shot"],
            [576] * 24,
            [576] * 4 + [64] * 29,
        ),
        # 4 x 576 + 28 x 9 = 32 x 79.875; with 10 left the average would be 80.75.
        (
            ["--method", "ficoco-l", "--kv-budget", "80", "--schedule", "one-shot"],
            [576] * 24,
            [576] * 4 + [9] * 29,
        ),
        (
            ["--method", "ficoco-l", "--schedule", "7:288,15:144,23:72"],
            [576] * 24,
            [576] * 8 + [288] * 8 + [144] * 8 + [72] * 9,
        ),
        # PyramidDrop reduces at its own layers, in which segments end, unless a start layer is given.
        (
            ["--method", "pyramiddrop", "--keep", "72"],
            [576] * 24,
            [576] * 8 + [288] * 8 + [144] * 8 + [72] * 9,
        ),
        (
            ["--method", "pyramiddrop", "--keep", "72", "--start-layer", "27"],
            [576] * 24,
            [576] * 28 + [72] * 5,
        ),
        # Without --encoder-keep, both parts shrink by the same ratio: 576, 192, 64.
        (
            [
                "--method",
                "ficoco-vl",
                "--keep",
                "64",
                "--schedule",
                "one-shot",
                "--encoder-schedule",
                "one-shot",
            ],
            [576] * 12 + [192] * 12,
            [192] * 4 + [64] * 29,
        ),
        (
            ["--method", "ficoco-vl", "--schedule", "9:50", "--encoder-schedule", "20:100"],
            [576] * 21 + [100] * 3,
            [100] * 10 + [50] * 23,
        ),
        (
            ["--method", "ficoco-vl", "--kv-budget", "56", "--schedule", "one-shot", "--encoder-keep", "70"],
            [576] * 12 + [533, 490, *range(448, 69, -42)],  # 506 = 2 x 43 + 10 x 42
            [70] * 4 + [54] * 29,
        ),
    ],
)
def test_schedules(
    capsys: pytest.CaptureFixture[str], options: list[str], encoder: list[int], decoder: list[int]
) -> None:
    method = () if "--method" in options else ("--method", "ficoco-v")
    parsed = report(capsys, LLAVA_7B, *method, *options)
    assert parsed["encoder_tokens"] == encoder
    assert parsed["decoder_visual_tokens"] == decoder


@pytest.mark.parametrize("method", ["ficoco-v", "tome", "evit"])
@pytest.mark.parametrize("keep", [48, 63, 64, 300, 576])
def test_the_tower_does_what_is_planned(capsys: pytest.CaptureFixture[str], method: str, keep: int) -> None:
    """The counts are those by which the server runs the tower."""
    parsed = report(capsys, LLAVA_7B, "--method", method, "--keep", str(keep))
    shape = TowerShape(grid=(24, 24), num_layers=24, num_executed_layers=23, with_cls=False)
    served = VisionPlanner.shared(FicocoConfig(method=method, keep=keep), shape)
    num_extra = get(method).num_extra
    counts = [576]
    removals = served.plan(served.default).removals
    for layer in range(23):
        gone = removals.get(layer, 0)
        counts.append(counts[-1] - gone + (num_extra if gone else 0))
    assert parsed["encoder_tokens"] == counts


@pytest.mark.parametrize("model", [LLAVA_7B, "llava-hf/llava-v1.6-vicuna-7b-hf", "demo"])
def test_every_method_has_a_plan_without_options(capsys: pytest.CaptureFixture[str], model: str) -> None:
    for method in (*available(), *PIPELINES):
        assert run(model, "--method", method) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("method", ["ficoco-v", "ficoco-l", *PIPELINES])
def test_without_a_budget_it_is_the_server_s(capsys: pytest.CaptureFixture[str], method: str) -> None:
    """A ninth of the image's tokens."""
    default, named = (
        report(capsys, LLAVA_7B, "--method", method, *budget) for budget in ((), ("--keep", "64"))
    )
    assert default["decoder_visual_tokens"] == named["decoder_visual_tokens"]
    assert default["encoder_tokens"] == named["encoder_tokens"]
    assert default["decoder_visual_tokens"][-1] == 64


@pytest.mark.parametrize(
    ("method", "megabytes"), [("ficoco-v", 65.0), ("ficoco-l", 199.0), ("ficoco-vl", 98.2)]
)
def test_the_kv_cache_is_the_served_one(
    capsys: pytest.CaptureFixture[str], method: str, megabytes: float
) -> None:
    """README's figures, by segments of four layers in the decoder."""
    planned = report(capsys, LLAVA_7B, "--method", method, "--keep", "64")
    assert planned["reduced"]["kv_bytes"] / 1e6 == pytest.approx(megabytes, abs=0.05)
    per_layer = planned["reduced"]["kv_bytes_per_layer"]
    assert all(len(set(per_layer[first : first + 4])) == 1 for first in range(0, 32, 4))


def test_a_configuration_on_disk_is_read(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[LLAVA_7B]))
    known = report(capsys, LLAVA_7B, "--keep", "64")
    for model in (tmp_path, tmp_path / "config.json"):
        assert {**report(capsys, str(model), "--keep", "64"), "model": LLAVA_7B} == known


def test_the_demo_model_is_found(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(KNOWN_MODELS[LLAVA_7B]))
    monkeypatch.setattr("ficoco_vllm.demo_model.path", lambda: tmp_path)
    named = report(capsys, "demo", "--keep", "64")
    assert named["decoder_visual_tokens"][-1] == 64
    assert named["method"] == DEFAULT_METHOD
    assert report(capsys, "--keep", "64") == named, "without a model it is the demo model"
    (tmp_path / "config.json").unlink()
    assert run("--keep", "64") == 2
    assert f"model: got 'demo', but there is no file {tmp_path / 'config.json'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["no/such", "--keep", "64"],
            "model: got 'no/such', but there is no file no/such, allowed: a folder",
        ),
        ([LLAVA_7B, "--keep", "577"], "ficoco.keep = 577 is not allowed; allowed: an integer from 1 to 576"),
        ([LLAVA_7B, "--keep", "64", "--method", "nope"], "ficoco: method = 'nope' is not a known method"),
        ([LLAVA_7B, "--keep", "64", "--dtype", "fp8"], "dtype: got 'fp8', allowed: fp16, int8, int4"),
        ([LLAVA_7B, "--keep", "64", "--images", "0"], "num_images: got 0, allowed: at least 1"),
        ([LLAVA_7B, "--keep", "64", "--text-tokens", "0"], "num_text_tokens: got 0, allowed: at least 1"),
        (
            [LLAVA_7B, "--keep", "64", "--schedule", "odd"],
            "schedule: got 'odd', allowed: even, one-shot, geometric",
        ),
        (
            [LLAVA_7B, "--schedule", "3:x"],
            "schedule: got '3:x', allowed: even, one-shot, geometric, or LAYER:KEEP",
        ),
        ([LLAVA_7B, "--schedule", "3:4:5"], "schedule: got '3:4:5', allowed"),
        (
            [LLAVA_7B, "--method", "ficoco-v", "--keep", "64", "--start-layer", "23"],
            "start_layer = 23 is not allowed; allowed: an integer from 0 to 22",
        ),
        (
            [LLAVA_7B, "--keep", "64", "--encoder-keep", "9"],
            "encoder_keep, encoder_schedule, encoder_start_layer",
        ),
        ([LLAVA_7B, "--keep", "64", "--kv-budget", "64"], "kv_budget: allowed without keep"),
        ([LLAVA_7B, "--keep", "0"], "ficoco.keep = 0 is not allowed; allowed: an integer from 1 to 576"),
        (["--keep", "-3"], "ficoco.keep = -3 is not allowed; allowed: an integer from 1 to 576"),
        (["--keep", "64.5"], "ficoco.keep = '64.5' is not allowed; allowed: an integer from 1 to 576"),
        (
            [LLAVA_7B, "--keep", "many"],
            "ficoco.keep = 'many' is not allowed; allowed: an integer from 1 to 576",
        ),
        ([NEXT_7B, "--keep", "0"], "ficoco.keep = 0 is not allowed; allowed: an integer of at least 1"),
        ([LLAVA_7B, "--keep", "64", "--text-tokens", "-3"], "num_text_tokens: got -3, allowed: at least 1"),
        ([LLAVA_7B, "--schedule", "11:64,11:9"], "schedule: got layer 11, allowed: 12 to 22, ascending"),
        ([LLAVA_7B, "--schedule", "11:0"], "schedule: got 0 left after layer 11, allowed: 1 to 576"),
        ([LLAVA_7B, "--kv-budget", "nan"], "kv_budget: got nan, allowed: a number of at least 1"),
        ([LLAVA_7B, "--kv-budget", "inf"], "kv_budget: got inf, allowed: a number of at least 1"),
        (
            [LLAVA_7B, "--method", "tome", "--keep", "9", "--start-layer", "22"],
            "keep = 9: 1 reducing layer can reach 288 of 576 at least",
        ),
        ([LLAVA_7B, "--method", "ficoco-vl", "--keep", "0"], "ficoco.keep = 0 is not allowed"),
        (
            [LLAVA_7B, "--keep", "9", "--schedule", "11:64"],
            "keep: got 9, allowed: 64, where the schedule ends",
        ),
        # The served decoder saves nothing after its last layer.
        (
            [LLAVA_7B, "--method", "ficoco-l", "--keep", "64", "--start-layer", "31"],
            "ficoco.start_layer = 31 is not allowed; allowed: layers 0 to 30",
        ),
        (
            [LLAVA_7B, "--method", "ficoco-l", "--schedule", "31:64"],
            "schedule: got layer 31, allowed: 0 to 30, ascending",
        ),
        # Both layers are nearest to the end of one segment.
        (
            [LLAVA_7B, "--method", "ficoco-l", "--schedule", "4:300,5:64"],
            "ficoco.layers = (4, 5) with a count for each: two are in one segment",
        ),
        ([LLAVA_7B, "--method", "ficoco-vl", "--schedule", "3:0"], "schedule: got 0 left after layer 3"),
        (
            [LLAVA_7B, "--method", "ficoco-vl", "--keep", "64", "--encoder-keep", "63"],
            "ficoco_keep = 64 is not allowed; allowed: an integer from 1 to 63",
        ),
        (
            [LLAVA_7B, "--method", "ficoco-l", "--kv-budget", "62.5", "--schedule", "one-shot"],
            "ficoco.kv_budget = 62.5 is not allowed; allowed: 72.88",
        ),
        (
            [LLAVA_7B, "--method", "topk-cls", "--keep", "64", "--schedule", "even"],
            "ficoco: schedule is not a setting of topk-cls; allowed: none",
        ),
    ],
)
def test_errors_go_to_stderr(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert run(*options) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"ficoco-vllm: error: {message}")
    assert printed.err.count("\n") == 1


def changed(*path: str, value: Any) -> bytes:
    """The configuration of LLaVA-1.5-7B with one field set, or left out where the value is None."""
    config = json.loads(json.dumps(KNOWN_MODELS[LLAVA_7B]))
    section = config[path[0]] if len(path) == 2 else config
    section[path[-1]] = value
    if value is None:
        del section[path[-1]]
    return json.dumps(config).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json is not JSON: Expecting property name"),
        (b"\xff\xfe", "config.json is not JSON: 'utf-8' codec"),
        (b"[" * 100_000, "config.json is not JSON: maximum recursion depth"),
        (b'{"model_type": ' + b"9" * 5000 + b"}", "config.json is not JSON: Exceeds the limit"),
        (b"[]", "config.json holds a list, allowed: a JSON object"),
        (b'{"model_type": "llava"}', "vision_config: got None, allowed: an object"),
        (changed("model_type", value=["llava"]), "model_type: got ['llava'], allowed: llava, llava_next"),
        (changed("vision_config", value=None), "vision_config: got None"),
        (changed("vision_config", "model_type", value={}), "vision_config.model_type: got {}, allowed"),
        (changed("vision_config", "image_size", value=10**12), "vision_config.image_size: got 1000000000000"),
        (
            changed("text_config", "num_hidden_layers", value=10**9),
            "text_config.num_hidden_layers: got 1000000000, allowed: an integer from 1 to 4096",
        ),
        (changed("text_config", "hidden_size", value=4096.0), "text_config.hidden_size: got 4096.0"),
    ],
    ids=range(12),
)
def test_a_broken_configuration_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert run(str(tmp_path), "--keep", "64") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_numbers_beyond_all_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(LLAVA_7B, "--keep", "64", "--text-tokens", "9" * 400) == 2
    assert capsys.readouterr().err == "ficoco-vllm: error: a number is too large to plan with\n"


@pytest.mark.parametrize("model", [LLAVA_7B, "llava-hf/llava-v1.6-vicuna-7b-hf"])
def test_runs_without_vllm(tmp_path: Path, model: str) -> None:
    """In a separate process, where importing vLLM, transformers or Triton fails."""
    script = f"""
import sys
for name in ("vllm", "transformers", "triton"):
    sys.modules[name] = None
from ficoco_vllm.server.cli import main
sys.exit(main(["plan", {model!r}, "--method", "ficoco-vl", "--keep", "64", "--json"]))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decoder_visual_tokens"][-1] == 64


def test_the_cpu_of_this_machine_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(where: str) -> Device:
        return Device(where, 1e11, 2e10, 24e9, 0.0, "measured here")

    monkeypatch.setattr("ficoco_vllm.benchmarks.harness.device.measure", measured)
    parsed = report(capsys, LLAVA_7B, "--keep", "64", "--device", "cpu")
    assert (parsed["device"]["name"], parsed["device"]["flops"]) == ("cpu", 1e11)
    # Not the assumed share of a data sheet's figures.
    arithmetic = parsed["unreduced"]["decoder_flops"] / 1e11
    assert parsed["predicted"]["unreduced"]["prefill_seconds"] == pytest.approx(arithmetic, rel=1e-3)


def test_device(capsys: pytest.CaptureFixture[str]) -> None:
    """Times, concurrency and throughput of a device, from the same plan."""
    options = [LLAVA_7B, "--keep", "64", "--device", "h100", "--output-tokens", "64"]
    parsed = report(capsys, *options)
    predicted = parsed["predicted"]
    assert parsed["device"]["name"] == "h100"
    assert predicted["num_output_tokens"] == 64
    assert predicted["reduced"]["ttft_seconds"] < predicted["unreduced"]["ttft_seconds"]
    assert run(*options) == 0
    text = capsys.readouterr().out
    assert "On h100, at least (NVIDIA H100 SXM data sheet" in text
    assert f"{1000 * predicted['reduced']['ttft_seconds']:.2f}" in text


@pytest.mark.parametrize("number", ["0", "-3"])
def test_output_tokens_that_cannot_be(capsys: pytest.CaptureFixture[str], number: str) -> None:
    assert run(LLAVA_7B, "--device", "h100", "--output-tokens", number) == 2
    assert f"output_tokens: got {number}, allowed: at least 1" in capsys.readouterr().err
