"""What the search may compose: stages, place and schedule of a reduction in the vision tower."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from ficoco_vllm.benchmarks.accuracy.variants import Variant
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.reduction import get
from ficoco_vllm.reduction.schedule import default_start_layer

FILTERS = (
    "local_task",
    "cls_attention",
    "key_similarity",
    "informativity",
    "max_min_distance",
    "outlier_then_even",
    "dominant_contextual",
)
CORRELATIONS = ("attention", "key_cosine")
MERGES = ("quantile_merge", "nearest_merge")
# In the encoder stages are exchanged in FiCoCo-V, whose own composition is one of the candidates.
ENCODER, FEATURES = "ficoco-v", "topk-cls"


def compositions(first: int, last: int) -> list[tuple[str, Mapping[str, Any]]]:
    """Every composition as the method it changes and the settings that change it.

    Args:
        first: layer from which the tower may reduce.
        last: layer that runs last.
    """
    middle = (first + last + 1) // 2
    places: list[tuple[str, Mapping[str, Any]]] = [
        (ENCODER, {"start_layer": layer, "schedule": schedule})
        for layer, schedule in (
            (first, "even"),
            (first, "geometric"),
            (first, "one-shot"),
            (middle, "one-shot"),
            (last, "one-shot"),
        )
    ]
    places.append((FEATURES, {}))
    return [(base, {**stages, **place}) for base, place in places for stages in _stages()]


def variants(planner: VisionPlanner, keeps: Sequence[int]) -> list[Variant]:
    """The compositions that can meet every budget, as variants without one.

    Args:
        planner: of the tower, for whether a schedule reaches a budget.
        keeps: budgets.
    """
    shape = planner.shape
    found = []
    for base, settings in compositions(default_start_layer(shape.num_layers), shape.num_executed_layers - 1):
        variant = Variant(_label(base, settings), "tower", base, None, settings)
        if all(can_meet(planner, variant, keep) for keep in keeps):
            found.append(variant)
    return found


def can_meet(planner: VisionPlanner, variant: Variant, keep: int) -> bool:
    """Whether a composition's schedule reaches a budget.

    Args:
        planner: of the tower.
        variant: of a method.
        keep: visual tokens left.
    """
    assert variant.method is not None
    try:
        config = planner.config.model_copy(update={"method": variant.method, "settings": variant.settings})
        VisionPlanner(config, planner.shape).plan(Budget(variant.method, keep))
        get(variant.method).configure(**variant.settings)
    except ValueError:
        return False
    return True


def _stages() -> Iterator[dict[str, str]]:
    for name in FILTERS:
        yield {"filter": name, "correlate": "none", "compress": "prune"}
        for correlation, compression in product(CORRELATIONS, MERGES):
            yield {"filter": name, "correlate": correlation, "compress": compression}


def _label(base: str, settings: Mapping[str, Any]) -> str:
    stages = " ".join(str(settings[kind]) for kind in ("filter", "correlate", "compress"))
    if base == FEATURES:
        return f"{stages}, behind the tower"
    return f"{stages}, {settings['schedule']} from layer {settings['start_layer']}"
