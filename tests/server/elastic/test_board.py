"""Several API server processes, one controller."""

import fcntl
import json
from pathlib import Path

import pytest

from ficoco_vllm.server.elastic.board import GONE_SECONDS, Board, News, Report
from ficoco_vllm.server.elastic.controller import Load, State
from ficoco_vllm.server.elastic.settings import ElasticSettings

SETTINGS = ElasticSettings(floor=64, ceiling=288)
FULL = Load(1.0, 10, 20)


def exchange(board: Board, now: float, news: News | None = None) -> tuple[State, Load]:
    """What the board says; it must be free."""
    seen = board.exchange(news or News(num_unfinished=1), now)
    assert seen is not None
    return seen


def test_processes_that_see_different_steps_agree(tmp_path: Path) -> None:
    boards = [Board(SETTINGS, tmp_path, process) for process in (1, 2)]
    level = []
    for tick in range(40):
        now = tick * 0.25
        # The statistics of a step reach one of them only.
        news = News({0: Report(now, FULL)}, num_unfinished=15)
        level.append(exchange(boards[tick % 2], now, news)[0].level)
        state, load = exchange(boards[(tick + 1) % 2], now + 0.01, News(num_unfinished=15))
        assert state.level == level[-1]
        assert load == FULL
    assert level[0] == 4
    assert level[-1] == 0


def test_two_processes_do_not_make_it_faster(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "three").mkdir()
    one = Board(SETTINGS, tmp_path / "one", 1)
    three = [Board(SETTINGS, tmp_path / "three", process) for process in (1, 2, 3)]
    for tick in range(10):
        now = tick * 0.25
        news = News({0: Report(now, FULL)}, num_unfinished=30)
        alone = exchange(one, now, news)[0]
        for index, board in enumerate(three):
            together = exchange(board, now + index * 1e-4, news)[0]
        assert together.level == alone.level
        assert together.pressure == pytest.approx(alone.pressure, abs=0.01)


def test_of_two_reports_of_an_engine_the_newer_one_counts(tmp_path: Path) -> None:
    one, two = Board(SETTINGS, tmp_path, 1), Board(SETTINGS, tmp_path, 2)
    exchange(one, 1.0, News({0: Report(0.9, FULL)}, num_unfinished=1))
    _, load = exchange(two, 1.1, News({0: Report(0.8, Load(0.1, 1, 0))}, num_unfinished=1))
    assert load == FULL


def test_engines_are_averaged(tmp_path: Path) -> None:
    one, two = Board(SETTINGS, tmp_path, 1), Board(SETTINGS, tmp_path, 2)
    exchange(one, 1.0, News({0: Report(1.0, Load(0.9, 9, 3))}, num_unfinished=12))
    _, load = exchange(two, 1.1, News({1: Report(1.0, Load(0.3, 3, 0))}, num_unfinished=3))
    assert load == Load(pytest.approx(0.6), 12, 3)
    _, load = exchange(two, 1.2 + GONE_SECONDS, News({1: Report(1.1 + GONE_SECONDS, Load(0.3, 3, 0))}, 0, 3))
    assert load.kv_usage == pytest.approx(0.15), "an engine that says nothing is idle, and still there"


def test_without_requests_the_last_report_does_not_count(tmp_path: Path) -> None:
    board = Board(SETTINGS, tmp_path, 1)
    exchange(board, 1.0, News({0: Report(1.0, FULL)}, num_unfinished=30))
    _, load = exchange(board, 1.25, News(num_unfinished=0))  # aborted: the engine makes no further step
    assert load == Load()


def test_requests_of_another_process_keep_the_report(tmp_path: Path) -> None:
    one, two = Board(SETTINGS, tmp_path, 1), Board(SETTINGS, tmp_path, 2)
    exchange(one, 1.0, News({0: Report(1.0, FULL)}, num_unfinished=30))
    assert exchange(two, 1.1, News(num_unfinished=0))[1] == FULL
    # A process that is heard of no more takes its requests with it.
    assert exchange(two, 2.0 + GONE_SECONDS, News(num_unfinished=0))[1] == Load()


def test_preempted_requests_of_all_processes_count_once(tmp_path: Path) -> None:
    one, two = Board(SETTINGS, tmp_path, 1), Board(SETTINGS, tmp_path, 2)
    exchange(one, 1.0, News({0: Report(1.0, Load(0.5, 8, 0))}, num_unfinished=8))
    assert exchange(two, 1.1, News(num_preempted=2, num_unfinished=1))[1].num_preempted == 2
    assert exchange(one, 1.2, News(num_unfinished=8))[1].num_preempted == 0


def test_a_process_that_stands_at_the_board_stops_nobody(tmp_path: Path) -> None:
    board = Board(SETTINGS, tmp_path, 1)
    exchange(board, 1.0)
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert board.exchange(News(), 2.0) is None
    exchange(board, 3.0)


def test_the_board_is_always_whole(tmp_path: Path) -> None:
    board = Board(SETTINGS, tmp_path, 1)
    exchange(board, 1.0, News({0: Report(1.0, FULL)}, num_unfinished=1))
    content = json.loads((tmp_path / "board.json").read_text())
    assert set(content) == {"state", "reports", "num_preempted", "servers"}
    (tmp_path / "board.draft").write_text("{")  # left by a process that was killed
    assert exchange(board, 1.25)[1] == FULL
