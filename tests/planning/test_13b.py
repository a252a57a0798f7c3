"""LLaVA-1.5-13B's shapes: 40 decoder layers, in which the paper's Table 9 is planned and served."""

import pytest

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.tower import VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction.cost import KNOWN_MODELS, Budget, model_shape, plan_tokens

SHAPE = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-13b-hf"])
NUM_LAYERS, NUM_PATCHES = SHAPE.decoder.num_layers, SHAPE.tower.num_patches
TOWER = TowerShape(
    grid=(24, 24),
    num_layers=SHAPE.tower.num_layers,
    num_executed_layers=SHAPE.tower.num_executed,
    with_cls=False,
)


def planner(**settings: object) -> DecoderPlanner:
    """Of the decoder, behind the tower."""
    config = FicocoConfig.parse(settings)
    tower = VisionPlanner.shared(config, TOWER)
    return DecoderPlanner.shared(config, NUM_LAYERS, tower.num_output_tokens(tower.default))


@pytest.mark.parametrize(
    ("settings", "entering", "left", "megabytes"),
    [
        ({"method": "ficoco-l", "keep": 25, "schedule": "one-shot"}, 576, 25, 485.0),
        ({"method": "ficoco-vl", "keep": 74, "schedule": "one-shot", "encoder": {"keep": 94}}, 94, 74, 481.7),
    ],
)
def test_rows_of_table_9_are_served_as_planned(
    settings: dict[str, object], entering: int, left: int, megabytes: float
) -> None:
    """Ten segments of four layers: the first ends in the paper's 4th layer. KV cache with 512 text tokens, fp16."""
    served = planner(**settings)
    assert (served.segments.num_segments, served.segments.size) == (10, 4)
    plan = served.plan(entering + 512, [(5, entering)], None)
    assert plan.counts == ((entering,),) + ((left,),) * 9
    slots = sum(plan.num_kv_tokens(segment, entering + 512) * 4 for segment in range(10))
    assert slots * 2 * SHAPE.decoder.kv_width * 2 / 1e6 == pytest.approx(megabytes, abs=0.05)


@pytest.mark.parametrize("method", ["fastv", "pyramiddrop", "sparsevlm", "fitprune"])
def test_other_methods_reach_their_budget(method: str) -> None:
    served = planner(method=method, keep=64)
    counts = served.counts(method, NUM_PATCHES, 64)
    assert (counts[0], counts[-1]) == (NUM_PATCHES, 64)
    assert NUM_LAYERS % len(counts) == 0


def test_segments_must_divide_40_layers() -> None:
    with pytest.raises(ValueError, match="num_segments = 16 does not divide the 40 layers"):
        planner(method="ficoco-l", keep=64, num_segments=16)


def test_the_tower_serves_the_row_of_ficoco_v() -> None:
    """84 tokens, layer by layer as the planner counts them."""
    tower = VisionPlanner.shared(FicocoConfig(method="ficoco-v", keep=84), TOWER)
    removals = tower.plan(tower.default).removals
    counts = [NUM_PATCHES]
    for layer in range(TOWER.num_executed_layers):
        counts.append(counts[-1] - removals.get(layer, 0))
    assert tuple(counts) == plan_tokens(SHAPE, "ficoco-v", Budget(keep=84)).encoder
