"""Tile sizes: defaults, measured ones, and their lookup."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ficoco_vllm.kernels import tuning

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty path for the file, with cleared caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning._measured.cache_clear()
    yield tmp_path
    tuning._measured.cache_clear()


def test_defaults_where_nothing_was_measured() -> None:
    assert tuning.config("merge", CPU) == tuning.CANDIDATES["merge"][0]
    assert tuning.config("merge", CPU, 2) == tuning.CANDIDATES["merge"][2]


def test_measured_ones_by_device_and_class() -> None:
    path = tuning.measured_path()
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"cpu": {"merge/0": 3}, "another": {"merge/2": 1}}))
    assert tuning.config("merge", CPU) == tuning.CANDIDATES["merge"][3]
    assert tuning.config("merge", CPU, 2) == tuning.CANDIDATES["merge"][2]


def test_tiles_are_powers_of_two() -> None:
    for candidates in tuning.CANDIDATES.values():
        assert len(set(map(str, candidates))) == len(candidates)
        for candidate in candidates:
            assert all(tile & (tile - 1) == 0 for tile in candidate.tiles.values())


def test_the_fastest_is_found() -> None:
    from ficoco_vllm.benchmarks.kernels.tune import fastest

    slow = {"merge/0": [3.0, 1.0, 2.0, 5.0, 4.0], "partition/1": [1.0, 2.0]}
    requested: list[tuple[int, int]] = []

    def run() -> float:
        requested.append(
            (
                tuning.CANDIDATES["merge"].index(tuning.config("merge", CPU)),
                tuning.CANDIDATES["partition"].index(tuning.config("partition", CPU, 1)),
            )
        )
        return slow["merge/0"][requested[-1][0]] + slow["partition/1"][requested[-1][1]]

    result = fastest([run, run], "cpu", lambda call: call())
    assert result == {"merge/0": 1, "partition/1": 0}
    assert len(requested) == 2 * (1 + len(tuning.CANDIDATES["merge"]) + len(tuning.CANDIDATES["partition"]))
