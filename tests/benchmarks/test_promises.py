"""The bars of the timing benchmarks fail if a server silently does not reduce, and pass for the committed results."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from ficoco_vllm.benchmarks.concurrency.__main__ import bars as concurrency_bars
from ficoco_vllm.benchmarks.decoding.__main__ import bars as decoding_bars
from ficoco_vllm.benchmarks.elastic.__main__ import bars as elastic_bars
from ficoco_vllm.benchmarks.harness.results import read, report
from ficoco_vllm.benchmarks.kernels import bench as kernels
from ficoco_vllm.benchmarks.kernels.cases import Case, tower
from ficoco_vllm.benchmarks.ttft.__main__ import bars as ttft_bars


@pytest.mark.parametrize("name", ["ttft", "ttft-avx2", "ttft-internvl3-8b", "ttft-qwen3-vl-8b"])
def test_published_times_hold_every_bar_and_stand_beside_a_control(name: str) -> None:
    result = read(name)
    assert [bar.name for bar in ttft_bars(result) if not bar.passed] == []
    controls = {"random", "downscale"} if "qwen" in name else {"random"}
    assert all(controls <= run["kinds"].keys() for run in result["runs"])
    assert controls <= result["whole_model"].keys()


def test_published_throughput_stands_beside_a_control() -> None:
    assert {"stock", "ficoco-v-64", "random-64"} <= {row["server"] for row in read("load")["summary"]}


def test_prompts_that_are_as_long_as_without_a_reduction_fail() -> None:
    result = read("ttft")
    name = "ttft-prompt-tokens-amiss-8-layers"
    assert name in {bar.name for bar in ttft_bars(result) if bar.passed}
    result["runs"][0]["kinds"]["keep-64"]["num_prompt_tokens"] = 636
    (bar,) = [bar for bar in ttft_bars(result) if bar.name == name]
    assert (bar.passed, bar.measured) == (False, 512)


def test_time_to_first_token_without_a_reduction_fails(capsys: pytest.CaptureFixture[str]) -> None:
    result = read("ttft")
    planted = copy.deepcopy(result)
    for run in planted["runs"]:
        # As fast as with all tokens.
        run["kinds"]["keep-64"]["speedup"] = run["kinds"]["keep-576"]["speedup"]
    planted["whole_model"]["keep-64"]["speedup"] = planted["whole_model"]["keep-576"]["speedup"]
    missed = {bar.name for bar in ttft_bars(planted) if not bar.passed}
    assert "ttft-keep-64-of-predicted-32-layers-extrapolated" in missed
    assert {f"ttft-keep-64-of-predicted-{layers}-layers" for layers in (8, 16)} <= missed
    assert report(list(ttft_bars(planted))) == 1
    assert "FAIL" in capsys.readouterr().out
    # docs/log.md: in a decoder cut short the tower weighs more than its FLOPs.
    assert "ttft-keep-64-of-predicted-32-layers-extrapolated" in {
        bar.name for bar in ttft_bars(result) if bar.passed
    }


@pytest.mark.parametrize("name", ["ficoco-l", "ficoco-l-one-shot", "ficoco-vl"])
def test_a_decoder_that_is_as_slow_as_without_a_reduction_fails(name: str) -> None:
    result = read("ttft")
    (run,) = [run for run in result["runs"] if run["layers"] == 8]
    bar = f"ttft-{name}-of-predicted-8-layers"
    assert bar in {bar.name for bar in ttft_bars(result) if bar.passed}
    run["kinds"][name]["speedup"] = 1.0
    assert bar in {bar.name for bar in ttft_bars(result) if not bar.passed}


@pytest.mark.parametrize("name", ["V 64", "L 64", "VL 64"])
def test_as_many_requests_at_once_as_stock_vllm_fails(name: str) -> None:
    kinds: dict[str, Any] = read("concurrency")["kinds"]
    assert all(bar.passed for bar in concurrency_bars(kinds))
    kinds[name]["ratio"] = 1.0
    (missed,) = [bar for bar in concurrency_bars(kinds) if not bar.passed]
    assert missed.name == f"concurrency-{name.replace(' ', '-')}-of-predicted"


def test_a_budget_that_does_not_follow_the_load_fails() -> None:
    result = read("elastic")["result"]
    fixed = result["fixed"]
    assert all(bar.passed for bar in elastic_bars(result))
    planted = result | {"elastic": fixed}
    assert {bar.name for bar in elastic_bars(planted) if not bar.passed} == {"elastic-late-ttft-of-fixed"}
    # Nor may arrivals that a fixed budget could serve pass for an overload.
    calm = result | {"fixed": fixed | {"late_ttft_seconds": fixed["early_ttft_seconds"]}}
    assert "elastic-fixed-ttft-growth" in {bar.name for bar in elastic_bars(calm) if not bar.passed}


def test_kernels_that_compute_something_else_are_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*args: Any) -> list[Case]:
        first, *_ = tower(*args)
        return [replace(first, ours=lambda: tuple(tensor + 1 for tensor in first.ours()))]

    monkeypatch.setattr(kernels, "tower", wrong)
    monkeypatch.setattr("sys.argv", ["bench", "--batches", "1"])
    assert kernels.main() == 1
    printed = capsys.readouterr()
    assert "so nothing is timed" in printed.err
    assert "ratio" not in printed.out


def test_a_decoding_step_takes_no_more_of_the_host_than_stock() -> None:
    result = read("decoding")
    assert all(bar.passed for bar in decoding_bars(result))
    planted = copy.deepcopy(result)
    planted["kinds"]["ficoco-l"]["256"]["step"] *= 1.5
    assert not any(bar.passed for bar in decoding_bars(planted))
