"""`make bench-ttft` and `make bench-concurrency` in miniature: real engines, few requests, a reduction secretly off."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.benchmarks.concurrency.__main__ import KINDS, measure, memory
from ficoco_vllm.benchmarks.concurrency.__main__ import bars as concurrency_bars
from ficoco_vllm.benchmarks.harness import model
from ficoco_vllm.benchmarks.harness.engine import Remote
from ficoco_vllm.benchmarks.ttft.__main__ import bars as ttft_bars
from ficoco_vllm.benchmarks.ttft.__main__ import engine, measure_in_turns, summarise
from ficoco_vllm.benchmarks.ttft.kinds import ENCODER_KINDS, STOCK, Kind
from ficoco_vllm.reduction.cost import Device

pytestmark = [pytest.mark.engine, pytest.mark.alone, pytest.mark.long]

# Its arithmetic is the only limit, so that predictions are ratios of FLOPs.
DEVICE = Device("made up", 1e9, 1e30, 1e12, 0.0, "made up")
LAYERS = 8  # of the demo model's decoder
TURNS = [kind for kind in ENCODER_KINDS if kind.keep in (576, 64)]


@pytest.fixture(scope="module")
def engines(demo_model: Path) -> Iterator[tuple[Remote, Remote]]:
    """Stock vLLM and ours, as `make bench-ttft` starts them, of the demo model."""
    folder = str(demo_model)
    with engine(folder, STOCK, "float32") as stock, engine(folder, TURNS[0], "float32") as ours:
        yield stock, ours


def missed(
    stock: Remote, ours: Remote, kinds: Sequence[Kind], rounds: int = 1
) -> tuple[set[str], dict[str, Any]]:
    """Names of the bars that fail, and the rows of a run; without a second depth nothing is extrapolated."""
    rows = summarise(LAYERS, measure_in_turns(LAYERS, stock, ours, kinds, rounds, random.Random(0)), DEVICE)
    result = {"runs": [{"layers": LAYERS, "kinds": rows}], "whole_model": rows}
    return {bar.name for bar in ttft_bars(result) if not bar.passed}, rows


def test_time_to_first_token_of_few_requests(engines: tuple[Remote, Remote]) -> None:
    matches, rows = missed(*engines, TURNS)
    assert [row["num_prompt_tokens"] for row in rows.values()] == [636, 636, 124]
    assert "ttft-prompt-tokens-amiss-8-layers" not in matches
    for row in rows.values():
        assert 0 < row["tower_seconds_median"] < row["ttft_seconds_median"]
        assert row["ttft_seconds_min"] <= row["ttft_seconds_median"] <= row["ttft_seconds_max"]
    assert rows["keep-64"]["reduction_seconds_median"] > 0
    assert rows["keep-576"]["reduction_seconds_median"] == rows["stock"]["reduction_seconds_median"] == 0


def test_an_engine_that_secretly_does_not_reduce_misses_its_bars(engines: tuple[Remote, Remote]) -> None:
    stock, _ = engines
    matches, _ = missed(stock, stock, TURNS)
    assert {"ttft-prompt-tokens-amiss-8-layers", "ttft-keep-64-of-predicted-8-layers"} <= matches


def test_requests_at_once_in_a_small_cache(tmp_path: Path) -> None:
    model.write(tmp_path, model.WHOLE_MODELS["7b"], narrow=True)
    kinds = {name: KINDS[name] for name in ("stock", "V 64")}
    rows = measure(str(tmp_path), kinds, memory(4))
    assert rows["stock"]["num_running"] == 4
    (bar,) = concurrency_bars(rows)
    assert bar.passed, rows
    # An engine that silently does not reduce would have the counts of stock vLLM.
    rows["V 64"] |= {key: rows["stock"][key] for key in ("num_running", "ratio")}
    (bar,) = concurrency_bars(rows)
    assert not bar.passed
