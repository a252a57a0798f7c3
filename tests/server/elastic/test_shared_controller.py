"""Several API server processes, one controller."""

import fcntl
import json
from pathlib import Path

import pytest

from ficoco_vllm.server.elastic.controller import State
from ficoco_vllm.server.elastic.settings import ElasticSettings
from ficoco_vllm.server.elastic.shared_controller import SharedController
from ficoco_vllm.server.load.reports import EXPIRY_SECONDS, EngineReport, Load, Observations

SETTINGS = ElasticSettings(floor=64, ceiling=288)
FULL = Load(1.0, 10, 20)


def update(
    controller: SharedController, now: float, observations: Observations | None = None
) -> tuple[State, Load]:
    """Update a controller that no other process is updating."""
    updated = controller.update(observations or Observations(num_unfinished=1), now)
    assert updated is not None
    return updated


def test_processes_that_see_different_steps_agree(tmp_path: Path) -> None:
    controllers = [SharedController(SETTINGS, tmp_path, process) for process in (1, 2)]
    level = []
    for tick in range(40):
        now = tick * 0.25
        # The statistics of a step reach one of them only.
        observations = Observations({0: EngineReport(now, FULL)}, num_unfinished=15)
        level.append(update(controllers[tick % 2], now, observations)[0].level)
        state, load = update(controllers[(tick + 1) % 2], now + 0.01, Observations(num_unfinished=15))
        assert state.level == level[-1]
        assert load == FULL
    assert level[0] == 4
    assert level[-1] == 0


def test_two_processes_do_not_make_it_faster(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one = SharedController(SETTINGS, tmp_path / "one", 1)
    three = [SharedController(SETTINGS, tmp_path / "three", process) for process in (1, 2, 3)]
    for tick in range(10):
        now = tick * 0.25
        observations = Observations({0: EngineReport(now, FULL)}, num_unfinished=30)
        alone = update(one, now, observations)[0]
        for index, controller in enumerate(three):
            together = update(controller, now + index * 1e-4, observations)[0]
        assert together.level == alone.level
        assert together.pressure == pytest.approx(alone.pressure, abs=0.01)


def test_the_newer_of_two_reports_of_an_engine_counts(tmp_path: Path) -> None:
    one, two = SharedController(SETTINGS, tmp_path, 1), SharedController(SETTINGS, tmp_path, 2)
    update(one, 1.0, Observations({0: EngineReport(0.9, FULL)}, num_unfinished=1))
    _, load = update(two, 1.1, Observations({0: EngineReport(0.8, Load(0.1, 1, 0))}, num_unfinished=1))
    assert load == FULL


def test_engines_are_averaged(tmp_path: Path) -> None:
    one, two = SharedController(SETTINGS, tmp_path, 1), SharedController(SETTINGS, tmp_path, 2)
    update(one, 1.0, Observations({0: EngineReport(1.0, Load(0.9, 9, 3))}, num_unfinished=12))
    _, load = update(two, 1.1, Observations({1: EngineReport(1.0, Load(0.3, 3, 0))}, num_unfinished=3))
    assert load == Load(pytest.approx(0.6), 12, 3)
    _, load = update(
        two,
        1.2 + EXPIRY_SECONDS,
        Observations({1: EngineReport(1.1 + EXPIRY_SECONDS, Load(0.3, 3, 0))}, 0, 3),
    )
    assert load.kv_usage == pytest.approx(0.15), "an engine that says nothing is idle, and still there"


def test_without_requests_the_last_report_does_not_count(tmp_path: Path) -> None:
    controller = SharedController(SETTINGS, tmp_path, 1)
    update(controller, 1.0, Observations({0: EngineReport(1.0, FULL)}, num_unfinished=30))
    _, load = update(
        controller, 1.25, Observations(num_unfinished=0)
    )  # aborted: the engine makes no further step
    assert load == Load()


def test_requests_of_another_process_keep_the_report(tmp_path: Path) -> None:
    one, two = SharedController(SETTINGS, tmp_path, 1), SharedController(SETTINGS, tmp_path, 2)
    update(one, 1.0, Observations({0: EngineReport(1.0, FULL)}, num_unfinished=30))
    assert update(two, 1.1, Observations(num_unfinished=0))[1] == FULL
    # Requests of a process that no longer reports are not counted.
    assert update(two, 2.0 + EXPIRY_SECONDS, Observations(num_unfinished=0))[1] == Load()


def test_preempted_requests_of_all_processes_count_once(tmp_path: Path) -> None:
    one, two = SharedController(SETTINGS, tmp_path, 1), SharedController(SETTINGS, tmp_path, 2)
    update(one, 1.0, Observations({0: EngineReport(1.0, Load(0.5, 8, 0))}, num_unfinished=8))
    assert update(two, 1.1, Observations(num_preempted=2, num_unfinished=1))[1].num_preempted == 2
    assert update(one, 1.2, Observations(num_unfinished=8))[1].num_preempted == 0


def test_a_held_lock_blocks_no_process(tmp_path: Path) -> None:
    controller = SharedController(SETTINGS, tmp_path, 1)
    update(controller, 1.0)
    with (tmp_path / "controller.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert controller.update(Observations(), 2.0) is None
    update(controller, 3.0)


def test_the_file_is_always_complete(tmp_path: Path) -> None:
    controller = SharedController(SETTINGS, tmp_path, 1)
    update(controller, 1.0, Observations({0: EngineReport(1.0, FULL)}, num_unfinished=1))
    content = json.loads((tmp_path / "controller.json").read_text())
    assert set(content) == {"state", "table"}
    (tmp_path / "controller.json.draft").write_text("{")  # left by a process that was killed
    assert update(controller, 1.25)[1] == FULL
