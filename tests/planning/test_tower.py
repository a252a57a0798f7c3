"""Budgets and schedules of the tower: integers only."""

from typing import Any

import pytest

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape

LLAVA_1_5 = TowerShape(grid=(24, 24), num_layers=24, num_executed_layers=23, with_cls=False)
DEMO = TowerShape(grid=(24, 24), num_layers=8, num_executed_layers=7, with_cls=False)


def planner(shape: TowerShape = LLAVA_1_5, **settings: Any) -> VisionPlanner:
    """A planner whose settings are checked, as at start-up."""
    return VisionPlanner.shared(FicocoConfig.parse(settings), shape)


def test_schedule_of_the_paper() -> None:
    """64 of 576: layers 12 to 23, counted from 1, 512 tokens spread evenly, remainder first."""
    plan = planner(method="ficoco-v", keep=64).plan(Budget("ficoco-v", 64))
    assert plan.removals == {layer: 43 if layer < 19 else 42 for layer in range(11, 23)}


def test_first_layer_scales_with_depth() -> None:
    assert list(planner(DEMO, keep=64).plan(Budget("ficoco-v", 64)).removals) == [3, 4, 5, 6]


def test_default_budget_is_a_ninth() -> None:
    assert planner(method="ficoco-v").default == Budget("ficoco-v", 64)


def test_without_settings_nothing_is_reduced() -> None:
    inactive = planner()
    assert not inactive.active
    assert inactive.default == Budget(None, 576)
    assert inactive.num_output_tokens(inactive.budget(None, None)) == 576
    with pytest.raises(ValueError, match="ficoco_keep: this server does not reduce"):
        inactive.budget(None, 64)


def test_cls_is_counted_where_the_model_takes_it() -> None:
    shape = TowerShape(grid=(24, 24), num_layers=24, num_executed_layers=23, with_cls=True)
    assert planner(shape, keep=64).num_output_tokens(Budget("ficoco-v", 64)) == 65


def test_a_request_chooses_method_and_budget() -> None:
    served = planner(keep=64, lam=0.5)
    assert served.budget("tome", 100) == Budget("tome", 100)
    assert served.budget(None, 100) == Budget("ficoco-v", 100)
    assert served.budget("random", None) == Budget("random", 64)


def test_settings_belong_to_the_method_of_the_server() -> None:
    served = planner(keep=64, lam=0.5)
    assert served.plan(Budget("ficoco-v", 64)).reducer.settings.model_dump()["lam"] == 0.5
    assert "lam" not in served.plan(Budget("tome", 64)).reducer.settings.model_dump()


def test_fingerprint_distinguishes_settings() -> None:
    prints = {
        planner(**settings).fingerprint for settings in ({"keep": 64}, {"keep": 65}, {"keep": 64, "lam": 0.5})
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 577}, "ficoco.keep = 577 is not allowed; allowed: an integer from 1 to 576"),
        ({"keep": 64, "filter": "text_relevance"}, "ficoco-v needs the signal `text_relevance`"),
        (
            {"keep": 64, "start_layer": 23},
            "start_layer = 23 is not allowed; allowed: an integer from 0 to 22",
        ),
        ({"keep": 64, "schedule": [512]}, "12 reducing layers need as many counts"),
        ({"keep": 9, "method": "tome", "start_layer": 22}, "reach 288 of 576 at least"),
    ],
)
def test_start_up_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", "\\[")):
        planner(**settings)
