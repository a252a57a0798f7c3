"""LLaVA-1.5-13B's shapes: 40 decoder layers, in which the paper's Table 9 is planned and served."""

import pytest

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.server import ServerPlan
from ficoco_vllm.reduction.cost import KNOWN_MODELS, estimate, model_shape
from ficoco_vllm.reduction.cost.paper_schedule import tower_tokens

SHAPE = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-13b-hf"])
NUM_LAYERS, NUM_PATCHES = SHAPE.decoder.num_layers, SHAPE.tower.num_patches


def server_plan(**settings: object) -> ServerPlan:
    """The plan of a server of the model."""
    return ServerPlan.for_model(FicocoConfig.parse(settings), SHAPE)


def planner(**settings: object) -> DecoderPlanner:
    """The decoder's planner of a server of the model."""
    decoder = server_plan(**settings).decoder
    assert decoder is not None
    return decoder


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
    tokens = server_plan(**settings).image_tokens()
    assert estimate(SHAPE, tokens, num_text_tokens=512).kv_bytes == slots * 2 * SHAPE.decoder.kv_width * 2


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
    """84 tokens, layer by layer by the paper's schedule."""
    assert server_plan(method="ficoco-v", keep=84).image_tokens().encoder == tower_tokens(SHAPE, 84)
