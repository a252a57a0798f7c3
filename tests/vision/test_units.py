"""Towers whose units are several patches, and towers without [CLS], on Hugging Face's InternVL in float64."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.planning.families.internvl import Mosaic
from ficoco_vllm.planning.tower import Budget, VisionPlanner
from ficoco_vllm.planning.tower_shape import TowerShape
from ficoco_vllm.reduction import Observation
from ficoco_vllm.vision.attention import ClipHeads, attention_with_lse
from ficoco_vllm.vision.tower import Tower, encode, run_whole
from ficoco_vllm.vision.units import UnitHeads, by_units
from tests.reference.internvl import ReferenceInternVL
from tests.support.random_internvl import MOST_TILES, TILE, UNITS

SIDE = 6
# Kernels on the CPU sum in float32; the tokens themselves stay in float64.
TOLERANCE = 1e-5
METHODS = [
    "ficoco-v",
    "tome",
    "evit",
    "topk-cls",
    "visionzip",
    "divprune",
    "spatial-pool",
    "prumerge",
    "turbo",
    "random",
]


@dataclass(frozen=True)
class Layer:
    """Hugging Face's layer."""

    layer: Any
    all_reduce: None = None

    @property
    def num_heads(self) -> int:
        """See `EncoderLayer`."""
        return int(self.layer.attention.num_heads)

    @property
    def scale(self) -> float:
        """See `EncoderLayer`."""
        return float(self.layer.attention.scale)

    def whole(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return self.layer(hidden)

    def heads(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `EncoderLayer`."""
        attention, x = self.layer.attention, self.layer.layernorm_before(hidden)

        def apart(part: Tensor) -> Tensor:
            return part.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

        query, key = attention.q_norm(attention.q_proj(x)), attention.k_norm(attention.k_proj(x))
        return apart(query), apart(key), apart(attention.v_proj(x))

    def project(self, mixed: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return self.layer.lambda_1 * self.layer.attention.projection_layer(mixed)

    def mlp(self, hidden: Tensor) -> Tensor:
        """See `EncoderLayer`."""
        return self.layer.lambda_2 * self.layer.mlp(self.layer.layernorm_after(hidden))


class HfTower(Tower):
    """Hugging Face's InternViT, its patches unit by unit."""

    unit = 4

    def __init__(self, tower: Any) -> None:
        self.tower = tower
        layers: list[Any] = [Layer(layer) for layer in tower.encoder.layer]
        self.layers = layers

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        hidden = self.tower.embeddings(pixels)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return torch.cat([hidden[:, :1], by_units(hidden[:, 1:], (SIDE, SIDE), 2)], dim=1)

    def finish(self, hidden: Tensor) -> Tensor:
        """See `Tower`."""
        return self.tower.layernorm(hidden)


class WithoutCls(HfTower):
    """The same without [CLS]."""

    has_cls = False

    def embed(self, pixels: Tensor) -> Tensor:
        """See `Tower`."""
        return super().embed(pixels)[:, 1:]


@pytest.fixture(scope="module")
def reference(random_internvl: Path) -> ReferenceInternVL:
    """Random weights."""
    return ReferenceInternVL(random_internvl)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """Two tiles of noise."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 3, TILE, TILE, dtype=torch.float64, generator=generator)


def planner(method: str, keep: int) -> VisionPlanner:
    """Plan of the random model's tower, with one method and budget."""
    shape = TowerShape((SIDE, SIDE), 6, 6, False, Mosaic(1, MOST_TILES, TILE, SIDE), unit=4)
    return VisionPlanner.shared(FicocoConfig(method=method, keep=keep), shape)


@pytest.mark.parametrize("keep", [35, 9, 4])
@pytest.mark.parametrize("method", METHODS)
def test_whole_units_leave(reference: ReferenceInternVL, pixels: Tensor, method: str, keep: int) -> None:
    """Both tiles in a batch; each equals the oracle's, which runs it alone."""
    reference.method = method
    tower = HfTower(reference.model.model.vision_tower)
    plan = planner(method, keep).plan(Budget(method, keep))
    with torch.no_grad():
        result = encode(tower, pixels, plan, (SIDE, SIDE)).split(tower.unit)[1]
        for tile, units in zip(pixels, result, strict=True):
            expected = reference.tile(tile[None], keep, SIDE)
            torch.testing.assert_close(units, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_nothing_leaves(reference: ReferenceInternVL, pixels: Tensor) -> None:
    reference.method = "ficoco-v"
    tower = HfTower(reference.model.model.vision_tower)
    with torch.no_grad():
        result = run_whole(tower, pixels).split(tower.unit)[1]
        torch.testing.assert_close(result[0], reference.tile(pixels[:1], UNITS, SIDE))


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("unit", [1, 4])
def test_signals(unit: int, logits: bool, has_cls: bool) -> None:
    """Pooled on demand against the whole map, pooled."""
    B, H, U, d = 2, 3, 5, 16
    N = U * unit
    generator = torch.Generator().manual_seed(unit)
    query, key, value = torch.randn(3, B, H, N + has_cls, d, generator=generator).unbind(0)
    bias = torch.randn(B, N + has_cls, generator=generator)
    _, lse = attention_with_lse(query, key, value, d**-0.5, bias)
    heads = ClipHeads(query, key, lse, d**-0.5, bias, H, logits=logits, has_cls=has_cls)
    measured = heads if unit == 1 else UnitHeads(heads, unit)
    dense = query @ key.transpose(2, 3) * d**-0.5 + bias[:, None, None]
    dense = (dense if logits else dense.softmax(dim=-1)).mean(dim=1)
    first = int(has_cls)
    patches = dense[:, first:, first:].view(B, U, unit, U, unit)
    expected = patches.sum(dim=4).mean(dim=2)
    lazy = measured.visual_attention()
    close = {"atol": 1e-5, "rtol": 1e-5}
    assert lazy.shape == expected.shape
    torch.testing.assert_close(lazy.dense(), expected, **close)
    torch.testing.assert_close(lazy.row_sum().float(), expected.sum(dim=2), **close)
    torch.testing.assert_close(lazy.column_sum(), expected.sum(dim=1), **close)
    source, target = torch.tensor([[0, 4], [1, 2]]), torch.tensor([[1, 2, 3], [0, 3, 4]])
    block = torch.stack(
        [one[rows][:, columns] for one, rows, columns in zip(expected, source, target, strict=True)]
    )
    torch.testing.assert_close(lazy.block(source, target), block, **close)
    text = torch.rand(B, 3, U, generator=generator)
    via = torch.stack(
        [one[:, rows].T @ one[:, columns] for one, rows, columns in zip(text, source, target, strict=True)]
    )
    torch.testing.assert_close(lazy.block(source, target, text, 0.6), 0.6 * block + 0.4 * via, **close)
    cls = dense[:, 0, 1:].view(B, U, unit).sum(dim=2) if has_cls else expected.mean(dim=1)
    torch.testing.assert_close(measured.cls_attention(), cls, **close)
    keys = key[:, :, first:].mean(dim=1).view(B, U, unit, d).mean(dim=2)
    torch.testing.assert_close(measured.keys(), keys, **close)


def test_an_observer_sees_units(reference: ReferenceInternVL, pixels: Tensor) -> None:
    seen: list[Observation] = []
    tower = HfTower(reference.model.model.vision_tower)
    plan = planner("ficoco-v", 9).plan(Budget("ficoco-v", 9))
    with torch.no_grad():
        encode(tower, pixels, plan, (SIDE, SIDE), observers=lambda site, layer: seen.append)
    assert len(seen) == len(plan.removals)
    assert [len(one.position[0]) for one in seen][-1] == 9
    assert seen[0].size.shape == (2, UNITS)


def test_a_tower_without_cls(reference: ReferenceInternVL, pixels: Tensor) -> None:
    """Nothing stands before the units; where [CLS] is wanted, the attention that a unit receives takes its place."""
    tower = WithoutCls(reference.model.model.vision_tower)
    with torch.no_grad():
        for method in METHODS:
            plan = planner(method, 9).plan(Budget(method, 9))
            tokens = encode(tower, pixels, plan, (SIDE, SIDE))
            assert tokens.split(4)[0].shape[1] == 0
            assert tokens.split(4)[1].shape == (2, 9, 4 * 128)
            assert tokens.hidden.isfinite().all()


@pytest.mark.parametrize("tower_class", [HfTower, WithoutCls])
def test_bfloat16_head_by_head(
    tower_class: type[HfTower], reference: ReferenceInternVL, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attention that returns sums of its weights takes the fused kernel's place; the same units stay."""
    tower = tower_class(copy.deepcopy(reference.model.model.vision_tower).bfloat16())
    plan = planner("ficoco-v", 9).plan(Budget("ficoco-v", 9))
    kept = []
    for faster in (True, False):
        monkeypatch.setattr("ficoco_vllm.vision.tower.is_faster", lambda query, faster=faster: faster)
        with torch.no_grad():
            kept.append(encode(tower, pixels.bfloat16(), plan, (SIDE, SIDE)))
    ours, fused = kept
    assert torch.equal(ours.position, fused.position)
    # A few roundings of bfloat16 in each of six layers.
    torch.testing.assert_close(ours.hidden, fused.hidden, atol=0.05, rtol=0.05)
