"""A reducing tower and a reducing decoder layer from end to end, once with the Triton kernels and once without."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder.attention import DecoderHeads
from ficoco_vllm.decoder.boundary import Part, boundary
from ficoco_vllm.decoder.reduction import Rows, reduce_rows
from ficoco_vllm.planning.decoder import DecoderPlanner
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.vision import attention
from ficoco_vllm.vision.tower import Tower, encode
from tests.kernels.conftest import DEVICE, needs_triton

# Rounding of sums in another order, carried through the layers; a choice that differs is off by about 1.
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
OPS = {
    "attention_scores.custom": ("cls_scores", "softmax_stats", "attention_block", "attention_sums"),
    "farthest_points.ops": ("_farthest_points",),
    "filter_scores.ops": ("_filter_scores",),
    "partition.ops": ("_partition",),
    "quantile_merge.ops": ("_quantile_merge",),
}
WIDTH, H, d = 64, 2, 32


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the Triton ops that ran."""
    names: set[str] = set()

    def watch(module: Any, name: str) -> None:
        op = getattr(module, name)

        def run(*arguments: Any) -> Any:
            names.add(name.removeprefix("_"))
            return op(*arguments)

        monkeypatch.setattr(module, name, run)

    for module, result in OPS.items():
        for name in result:
            watch(import_module(f"ficoco_vllm.kernels.{module}"), name)
    return names


class Layer(nn.Module):
    """One CLIP layer (`EncoderLayer`), without vLLM. Before the reducing ones it changes nothing."""

    scale, num_heads, all_reduce = d**-0.5, H, None

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * H * d), nn.Linear(H * d, WIDTH)
        self.feed = nn.Linear(WIDTH, WIDTH)

    def whole(self, hidden: Tensor) -> Tensor:
        return hidden

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.qkv(self.norm(hidden)).unflatten(-1, (3, H, d))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value

    def project(self, mixed: Tensor) -> Tensor:
        projected: Tensor = self.out(mixed)
        return projected

    def mlp(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.feed(self.second_norm(hidden))
        return output


class Embedded(Tower):
    """A tower whose images are patches already."""

    def __init__(self, layers: list[Layer]) -> None:
        self.layers = layers

    def embed(self, pixels: Tensor) -> Tensor:
        return pixels


@pytest.mark.parametrize(
    ("method", "settings", "ops"),
    [
        ("ficoco-v", {}, {"cls_scores", "attention_block", "filter_scores", "partition", "quantile_merge"}),
        ("ficoco-v", {"average": True, "epsilon": 0.8}, {"quantile_merge"}),
        ("ficoco-v", {"fixed_k": 2, "local_penalty": False}, {"quantile_merge"}),
        ("ficoco-v", {"fixed_k": 0, "proportional_attention": True}, {"quantile_merge"}),
        ("ficoco-v", {"attention": "logits"}, {"filter_scores", "partition", "quantile_merge"}),
        ("best", {}, {"farthest_points", "cls_scores", "partition", "quantile_merge"}),
        ("tome", {}, {"partition"}),
        ("evit", {}, {"attention_block", "partition"}),
        ("visionzip", {}, {"cls_scores", "partition"}),
    ],
    ids=lambda value: "-".join(sorted(value)) if isinstance(value, set) else str(value),  # in one order
)
@pytest.mark.parametrize("handed_out", [True, False])
def test_tower(
    method: str,
    settings: dict[str, Any],
    ops: set[str],
    handed_out: bool,
    launched: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If the attention does not return its normalisers, as on a GPU, one more op computes them."""
    needs_triton()
    if not handed_out:
        plain = attention.attention_with_lse
        monkeypatch.setattr(
            "ficoco_vllm.vision.tower.attention_with_lse", lambda *arguments: (plain(*arguments)[0], None)
        )
    torch.manual_seed(0)
    pixels = torch.randn(2, 26, WIDTH, device=DEVICE)
    layers = [Layer().to(DEVICE) for _ in range(3)]
    tower = Embedded(layers)
    shape = TowerShape(grid=(5, 5), num_layers=3, num_executed_layers=3, with_cls=False)
    result = {}
    with torch.inference_mode():
        for backend in ("torch", "triton"):
            start = {"start_layer": 1} if method in ("ficoco-v", "tome", "evit") else {}
            config = FicocoConfig.parse(
                {"method": method, "keep": 9, "backend": backend, **start, **settings}
            )
            planner = VisionPlanner.shared(config, shape)
            result[backend] = encode(tower, pixels, planner.plan(Budget(method, 9)), (5, 5)).hidden
            assert bool(launched) == (backend == "triton")
    looks = method != "tome" and settings.get("attention") != "logits"
    expected = ops | ({"softmax_stats"} if looks and not handed_out else set())
    assert expected <= launched
    torch.testing.assert_close(result["triton"], result["torch"], **CLOSE)


@pytest.mark.parametrize(
    ("method", "ops"),
    [
        ("ficoco-l", {"softmax_stats", "attention_block", "filter_scores", "partition", "quantile_merge"}),
        ("fastv", {"softmax_stats", "attention_block", "partition"}),
        ("fitprune", {"softmax_stats", "attention_block", "attention_sums", "partition"}),
        ("sparsevlm", {"softmax_stats", "attention_block", "partition"}),
        ("pyramiddrop", {"softmax_stats", "attention_block", "partition"}),
    ],
)
def test_decoder(method: str, ops: set[str], launched: set[str]) -> None:
    """Two prompts of different length, grouped-query heads."""
    needs_triton()
    torch.manual_seed(1)
    lengths, images = (30, 24), ((4, 16), (2, 16))
    hidden = torch.randn(sum(lengths), WIDTH, device=DEVICE)
    query = torch.randn(sum(lengths), 2 * H, d, device=DEVICE)
    key = torch.randn(sum(lengths), H, d, device=DEVICE)
    result = {}
    for backend in ("torch", "triton"):
        config = FicocoConfig.parse({"method": method, "keep": 5, "num_segments": 4, "backend": backend})
        planner = DecoderPlanner.shared(config, 4, 16)
        segment = planner.reducing_segments(method)[0]
        plans = [planner.plan(length, [image], None) for length, image in zip(lengths, images, strict=True)]
        parts = [Part(plan, 0, plan.num_prompt_tokens) for plan in plans]
        where = boundary([0, 30, 54], parts, segment, lambda name: False)
        heads = DecoderHeads(query, key, d**-0.5, 2 * H, None, planner.config.backend)
        rows = Rows(hidden, torch.arange(54, device=DEVICE), torch.ones(54, device=DEVICE))
        result[backend] = reduce_rows(rows, heads, where, planner, (4, 4))
        assert bool(launched) == (backend == "triton")
    assert ops <= launched
    assert torch.equal(result["triton"].origin, result["torch"].origin)
    torch.testing.assert_close(result["triton"].hidden, result["torch"].hidden, **CLOSE)
    torch.testing.assert_close(result["triton"].size, result["torch"].size, **CLOSE)
