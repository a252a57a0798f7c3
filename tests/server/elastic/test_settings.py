"""Allowed and refused values of `--ficoco-elastic`."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ficoco_vllm.server.elastic.settings import ElasticSettings

GOOD = {"floor": 64, "ceiling": 288}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"floor": 0}, ("floor = 0", "an integer of at least 1, below ceiling")),
        ({"floor": "64"}, ("floor = '64'", "an integer")),
        ({"floor": True}, ("floor = True", "an integer")),
        ({"floor": 288}, ("ceiling = 288", "floor = 288", "an integer above floor")),
        ({"ceiling": 63}, ("ceiling = 63", "floor = 64")),
        ({"target_kv_usage": 0}, ("target_kv_usage = 0", "above 0, at most 1")),
        ({"target_kv_usage": 1.1}, ("target_kv_usage = 1.1", "above 0, at most 1")),
        ({"target_kv_usage": float("nan")}, ("target_kv_usage = nan",)),
        ({"target_queue": 0}, ("target_queue = 0", "a number above 0")),
        ({"levels": 1}, ("levels = 1", "an integer from 2 to 16")),
        ({"levels": 17}, ("levels = 17", "an integer from 2 to 16")),
        ({"hysteresis": 0.6}, ("hysteresis = 0.6", "from 0 to 0.5")),
        ({"attack_seconds": 0}, ("attack_seconds = 0", "above 0")),
        ({"attack_seconds": 20}, ("release_seconds = 10.0", "attack_seconds = 20")),
        ({"max_release_seconds": 5}, ("max_release_seconds = 5", "release_seconds = 10.0")),
        ({"top": 5}, ("top is not a field", "floor, ceiling, target_kv_usage")),
        ({"floor": None, "ceiling": 0}, ("floor = None", "ceiling = 0")),
    ],
)
def test_an_error_names_field_value_and_what_is_allowed(
    change: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(ValueError, match="--ficoco-elastic") as error:
        ElasticSettings.load(json.dumps({**GOOD, **change}))
    for part in (*named, "allowed: "):
        assert part in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "64", '"auto"'])
def test_what_is_no_object_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="floor") as error:
        ElasticSettings.load(text)
    assert repr(text) in str(error.value)


def test_a_missing_bound_is_named() -> None:
    with pytest.raises(ValueError, match="ceiling is missing"):
        ElasticSettings.load('{"floor": 64}')


def test_levels_lie_in_equal_ratios() -> None:
    assert ElasticSettings.load(json.dumps(GOOD)).budgets == (64, 93, 136, 198, 288)
    assert ElasticSettings(floor=64, ceiling=65).budgets == (64, 65)


@given(floor=st.integers(1, 575), above=st.integers(1, 575), levels=st.integers(2, 16))
def test_levels_ascend_from_floor_to_ceiling(floor: int, above: int, levels: int) -> None:
    settings = ElasticSettings(floor=floor, ceiling=floor + above, levels=levels)
    budgets = settings.budgets
    assert (budgets[0], budgets[-1]) == (floor, floor + above)
    assert list(budgets) == sorted(set(budgets))
    assert len(budgets) <= levels


def test_bounds_of_operator_and_model() -> None:
    settings = ElasticSettings(**GOOD)
    settings.check_bounds(min_keep=64, max_keep=288)
    with pytest.raises(ValueError, match=r"floor = 64 .* at least 65 \(--ficoco-min-keep\)"):
        settings.check_bounds(min_keep=65, max_keep=576)
    with pytest.raises(ValueError, match=r"ceiling = 288 .* at most 287"):
        settings.check_bounds(min_keep=1, max_keep=287)
