"""Answers survive a run that is cut off."""

from pathlib import Path

import pytest

from ficoco_vllm.benchmarks.accuracy.store import Reply, Store

RUN = {"model": "demo", "seed": 0}
REPLY = Reply("yes", 78, {"yes": -0.25})


def test_goes_on_after_a_kill_in_the_middle_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Store(path, RUN) as store:
        store.add("full", "a", REPLY)
        store.add("full", "b", REPLY)
    path.write_text(path.read_text()[:-7])
    with Store(path, RUN) as store:
        assert ("full", "a") in store
        assert ("full", "b") not in store
        store.add("full", "b", REPLY)
    with Store(path, RUN) as store:
        assert store["full", "b"] == REPLY


def test_refuses_the_answers_of_another_run(tmp_path: Path) -> None:
    with Store(tmp_path / "answers.jsonl", RUN):
        pass
    with pytest.raises(ValueError, match="answers of another run"):
        Store(tmp_path / "answers.jsonl", {**RUN, "seed": 1})


def test_a_file_without_a_whole_line_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"run": {"mod')
    with Store(path, RUN) as store:
        assert not store
    assert path.read_text().startswith('{"run": {"model": "demo"')
