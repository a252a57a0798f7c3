"""The soak in miniature, and its detection of planted leaks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from ficoco_vllm.benchmarks.harness.results import read
from ficoco_vllm.benchmarks.soak.engine.__main__ import ENGINE, FICOCO, bars
from ficoco_vllm.benchmarks.soak.engine.adapters import write_adapter
from ficoco_vllm.benchmarks.soak.engine.run import run
from tests.support.engine import scheduler_of
from tests.support.remote import Remote, remote_engine

pytestmark = pytest.mark.compat

# Takes more requests than a test has.
RARE = ("soak-engine-preemptions", "soak-engine-aborts")
LOOK = {"num_free_blocks": 320, "num_held_blocks": [0] * 8, "num_plans": 0}


def failures(record: dict[str, Any]) -> set[str]:
    """Names of the bars that fail, without those for rare events."""
    return {bar.name for bar in bars(record) if not bar.passed and not bar.name.startswith(RARE)}


def made_up(mib_per_round: float, **last: Any) -> dict[str, Any]:
    """A run of 2,000 requests whose memory grows from round to round."""
    rounds = [
        LOOK | {"num_requests": 50 * (i + 1), "rss_mib": 900 + i % 3 + i * mib_per_round} for i in range(40)
    ]
    rounds[-1] |= last
    return {
        "start": LOOK,
        "rounds": rounds,
        "num_finished": 1990,
        "num_aborted": {"waiting": 10},
        "num_found": 9,
        "num_in_chunks": 2,
        "num_adapted": 900,
    }


@pytest.mark.parametrize(
    ("record", "failing"),
    [
        (made_up(0.1), set()),
        (made_up(2.0), {"soak-engine-rss-growth-mib-per-1000-requests"}),
        (made_up(0.0, num_free_blocks=319), {"soak-engine-blocks-not-free-again"}),
        (made_up(0.0, num_held_blocks=[0] * 6 + [1, 0]), {"soak-engine-blocks-held-by-group-6"}),
        (made_up(0.0, num_plans=1), {"soak-engine-plans-left"}),
        (made_up(0.0) | {"num_finished": 1989}, {"soak-engine-requests-answered-or-aborted"}),
        (made_up(0.0) | {"num_found": 0}, {"soak-engine-prefixes-found"}),
        (made_up(0.0) | {"num_in_chunks": 0}, {"soak-engine-prompts-in-chunks"}),
        (made_up(0.0) | {"num_adapted": 0}, {"soak-engine-answers-by-adapters"}),
    ],
)
def test_bars(record: dict[str, Any], failing: set[str]) -> None:
    assert failures(record | {"num_preempted": 0}) == failing


def test_the_committed_run_kept_every_promise() -> None:
    record = read("soak-engine")
    assert record["rounds"][-1]["num_requests"] == 2000
    assert [bar.name for bar in bars(record) if not bar.passed] == []


@pytest.fixture(scope="module")
def engine(demo_model: Path) -> Iterator[Remote]:
    """As `make soak-engine` starts it."""
    with remote_engine(demo_model, FICOCO, **ENGINE) as engine:
        yield engine


def soaked(engine: LLM, num_requests: int, seed: int, *adapters: str) -> dict[str, Any]:
    """A short run."""
    return run(engine, num_requests, num_requests // 2, seed, adapters, num_open=8, abort_share=0.5)


@pytest.mark.long
@pytest.mark.engine
def test_miniature_run(engine: Remote, demo_model: Path, tmp_path: Path) -> None:
    write_adapter(demo_model, tmp_path / "adapter", 0)
    record = engine.call(soaked, 20, 0, str(tmp_path / "adapter"))
    assert failures(record) == set()
    assert sum(record["num_aborted"].values()) >= 2
    assert len(record["rounds"]) == 2


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize(
    ("break_it", "failing"),
    [("keep_a_block", "soak-engine-blocks-not-free-again"), ("keep_plans", "soak-engine-plans-left")],
)
def test_a_planted_leak_is_noticed(engine: Remote, break_it: str, failing: str) -> None:
    engine.call(globals()[break_it])
    assert failing in failures(engine.call(soaked, 8, 1))


def keep_a_block(engine: LLM) -> None:
    """Let one group forget a block of every request."""
    group = scheduler_of(engine).kv_cache_manager.coordinator.single_type_managers[5]
    pop = group.pop_blocks_for_free
    group.pop_blocks_for_free = lambda request_id: pop(request_id)[1:]


class Keeping(dict[str, Any]):
    """A dictionary that keeps its entries when they are popped."""

    def pop(self, *args: Any) -> None:
        """Do nothing."""


def keep_plans(engine: LLM) -> None:
    """Let the scheduler remember every plan."""
    scheduler_of(engine).plans = Keeping()
