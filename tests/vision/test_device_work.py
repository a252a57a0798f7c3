"""What a reducing tower asks of the device: few launches, and never an answer.

The tower runs on meta tensors, as it would on a GPU: Triton's launchers are called and recorded. Meta tensors hold no
data, so whatever would wait for the device (`item`, `nonzero`, a boolean index) fails, and all shapes are known on the
host. With fixed shapes and no wait, the work can be captured in a CUDA graph.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import available
from ficoco_vllm.vision.tower import encode
from ficoco_vllm.vision.vllm_tower import VllmTower
from tests.kernels.conftest import INTERPRETED
from tests.support.device_work import DeviceWork, record_launches

pytestmark = [
    pytest.mark.compiler,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter replaces the launcher"),
]

GRID, WIDTH, H, d = (24, 24), 64, 2, 32
# Launches of a tower that reduces nothing: positions and sizes at its start, two residual sums in the last layer, and
# its heads' outputs side by side.
OTHERS = Counter({"arange": 1, "new_ones": 1, "add": 2, "reshape": 1})
# Launches of one reduction. Three more compute the normalisers, where the attention returns none.
BUDGET = {
    "best": 22,
    "divprune": 16,
    "evit": 18,
    "ficoco-v": 8,
    "prumerge": 32,
    "prumerge-plus": 67,
    "random": 21,
    "recoverable": 76,
    "spatial-pool": 61,
    "tome": 45,
    "topk-cls": 9,
    "trim": 17,
    "turbo": 46,
    "visionzip": 59,
    "vscan-v": 59,
}
# Launches of a filter that picks one token after another without a kernel of its own: at the start, and for each pick.
PICKS = {"cdpruner": (24, 21), "scope": (22, 13), "tops-v": (30, 24)}
KEPT = 490


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of the fused ops."""
    return record_launches(monkeypatch)


def layer() -> Any:
    """A CLIP layer whose own work costs nothing, so that only the reduction's is counted."""

    class Layer:
        self_attn = SimpleNamespace(
            qkv_proj=lambda x: (x.new_empty((*x.shape[:2], 3 * H * d)), None),
            out_proj=lambda x: (x, None),
            num_heads_per_partition=H,
            num_heads=H,
            head_dim=d,
            scale=d**-0.5,
            tp_size=1,
        )
        layer_norm1 = layer_norm2 = mlp = staticmethod(lambda x: x)

        def __call__(self, hidden: Tensor) -> Tensor:
            return hidden

    return Layer()


def work(method: str, handed_out: bool, monkeypatch: pytest.MonkeyPatch) -> DeviceWork:
    """The device's work of a tower whose last layer reduces."""

    def attention(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        return query, query.new_empty(query.shape[:3], dtype=torch.float32) if handed_out else None

    monkeypatch.setattr("ficoco_vllm.vision.tower.attention_with_lse", attention)
    shape = TowerShape(GRID, num_layers=3, num_executed_layers=3, with_cls=False)
    start = {"start_layer": 2} if method in available("encoder") else {}
    config = FicocoConfig.parse({"method": method, "keep": 490, "backend": "triton", **start})
    plan = VisionPlanner.shared(config, shape).plan(Budget(method, KEPT))
    tower: Any = SimpleNamespace(
        embeddings=lambda x: x,
        pre_layrnorm=lambda x: x,
        encoder=SimpleNamespace(layers=[layer() for _ in range(3)]),
    )
    pixels = torch.empty(2, 577, WIDTH, device="meta")

    def relevance(units: Tensor) -> Tensor:
        return units.new_empty(units.shape[:2], dtype=torch.float32)

    with torch.inference_mode(), DeviceWork() as done:
        encode(VllmTower(tower), pixels, plan, GRID, relevance=relevance)
    return done


@pytest.mark.parametrize("method", sorted({*BUDGET, *PICKS}))
def test_launches_of_a_reduction(
    method: str, recorded: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = work(method, handed_out=True, monkeypatch=monkeypatch)
    launches = done.launches + recorded - OTHERS
    assert recorded["partition_kernel"] == 1, "the fused ops run"
    once, each = PICKS.get(method, (BUDGET.get(method, 0), 0))
    assert launches.total() <= once + each * KEPT, launches
    assert not done.copies, "a copy from the host stops the device, and a graph would repeat the old data"


def test_every_served_method_has_a_budget() -> None:
    shape = TowerShape(GRID, num_layers=24, num_executed_layers=23, with_cls=False)
    assert {*BUDGET, *PICKS} == set(
        VisionPlanner.shared(FicocoConfig.parse({"method": "tome"}), shape).methods
    )


def test_normalisers_cost_three_launches(recorded: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    totals = []
    for handed_out in (True, False):
        recorded.clear()
        totals.append((work("ficoco-v", handed_out, monkeypatch).launches + recorded).total())
    assert totals[1] == totals[0] + 3


@pytest.mark.parametrize("wait", [lambda x: x[0, 0].item(), lambda x: x[x > 0], lambda x: x.tolist()])
def test_a_wait_for_the_device_fails(wait: Any) -> None:
    """The check itself: what would wait raises on meta tensors."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        wait(torch.empty((2, 2), device="meta"))


def test_a_copy_from_the_host_is_seen() -> None:
    with DeviceWork() as done:
        torch.arange(3).to("meta")
    assert done.copies
