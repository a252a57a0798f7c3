"""`make bench-gpu` without a GPU: every step's code on the demo model, and the bars on figures that are made up."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.benchmarks.gpu.__main__ import STEPS, bars

ROWS = ("stock", "no-method", "keep-576", "keep-192", "keep-64", "ficoco-l", "ficoco-vl")


def serving(gain: float, running: int) -> dict[str, Any]:
    """One row; `gain` over a server whose first token takes a second."""
    seconds = {"median": 1 / gain, "min": 1 / gain, "max": 1 / gain}
    tower = {"median": 0.1 / gain**0.1, "min": 0.0, "max": 1.0}
    return {
        "ttft_seconds": seconds,
        "tower_seconds": tower,
        "tower_batch_seconds": tower,
        "requests_per_second": 10 * gain,
        "num_running": running,
        "predicted": {"ttft_seconds": 1 / gain, "requests_per_second": 10 * gain, "num_concurrent": 40},
    }


def good() -> dict[str, Any]:
    """A result that holds every bar."""
    kernel = {"name": "merge/tower", "floor_bytes": 10**9, "floor_flops": 0, "num_launches": 2}
    return {
        "settings": {"requests": 64},
        "ceilings": {"flops": 1e15, "bandwidth": 1e12, "launch_seconds": 5e-6},
        "answers": {
            name: {"num_right": right, "num_asked": 6, "rows": []}
            for name, right in (("stock", 6), ("ficoco-v-576", 6), ("ficoco-l-64", 3))
        },
        "kernels": [{**kernel, "B": 1, "seconds": 0.0015}, {**kernel, "B": 8, "seconds": 0.00149}],
        "serving": {name: serving(1 if name in ROWS[:3] else 4, 40) for name in ROWS},
        "steps": {"stock": 0.01, "ficoco-l-576": 0.0109},
    }


def failed(result: dict[str, Any]) -> set[str]:
    """Names of the bars that fail."""
    return {bar.name for bar in bars(result) if not bar.passed}


def test_a_good_result_holds_its_bars() -> None:
    assert not failed(good())
    assert len(list(bars(good()))) == 3 + 2 + 3 * 3 + 2 + 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda r: r["answers"]["stock"].update(num_right=5), "gpu-answers-stock"),
        (lambda r: r["answers"]["ficoco-l-64"].update(num_right=2), "gpu-answers-ficoco-l-64"),
        (lambda r: r["kernels"][0].update(seconds=0.00152), "gpu-kernel[merge/tower,B=1]"),
        (lambda r: r["kernels"][1].update(seconds=0.00151), "gpu-kernel[merge/tower,B=8]"),
        (
            lambda r: r["serving"]["ficoco-l"]["ttft_seconds"].update(median=0.3),
            "gpu-ttft-ficoco-l-of-roofline",
        ),
        (
            lambda r: r["serving"]["keep-64"].update(requests_per_second=35),
            "gpu-throughput-keep-64-of-roofline",
        ),
        (lambda r: r["serving"]["ficoco-vl"].update(num_running=37), "gpu-concurrent-ficoco-vl-of-plan"),
        (
            lambda r: r["serving"]["no-method"]["tower_seconds"].update(median=0.01),
            "gpu-tower-seconds-over-stock",
        ),
        (lambda r: r["steps"].update(stock=0.0098), "gpu-step-of-ficoco-l-over-stock"),
    ],
)
def test_each_bar_can_fail(change: Any, name: str) -> None:
    result = good()
    change(result)
    assert name in failed(result)


def test_a_step_that_did_not_run_has_no_bars() -> None:
    assert list(bars({"settings": {"requests": 1}, "ceilings": {}, "failed": {"answers": "no GPU"}})) == []


def test_it_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ficoco_vllm.benchmarks.gpu"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "there is no GPU; --emulate runs the code of every step without one" in done.stderr


def answers_are_right(answers: dict[str, Any]) -> None:
    for name, row in answers.items():
        assert row["num_right"] == row["num_asked"] or name.endswith("-64")


def every_row_is_served(serving: dict[str, Any]) -> None:
    assert set(serving) == set(ROWS)
    assert serving["keep-64"]["num_prompt_tokens"] == 124
    assert all(row["step_seconds"] > 0 for row in serving.values())


CHECKS: dict[str, Callable[[Any], None]] = {"answers": answers_are_right, "serving": every_row_is_served}


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("step", STEPS)
def test_every_step_runs(tmp_path: Path, step: str) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "ficoco_vllm.benchmarks.gpu",
        "--emulate",
        "--steps",
        step,
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=800)
    assert "BAR gpu-steps-failed 0 0 PASS" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["failed"] == {}
    assert result[step]
    CHECKS.get(step, lambda figures: None)(result[step])
