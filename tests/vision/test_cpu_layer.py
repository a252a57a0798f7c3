"""The CPU fast path against the layer itself, and how exact its attention is."""

from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.model_executor.models.clip import CLIPEncoderLayer

from ficoco_vllm.vision.cpu_layer import centred_attention, is_faster, plain_layer

HEADS, WIDTH = 2, 64
# float32 sums of 64 products; the product of other row counts may sum in another order.
TOLERANCE = 1e-5


class Linear(nn.Linear):
    """Returns a pair as vLLM's linear layers do, and notes its rows."""

    rows = 0

    def forward(self, values: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        self.rows = values.numel() // values.shape[-1]
        return super().forward(values), None


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv_proj, self.out_proj = Linear(WIDTH, 3 * WIDTH), Linear(WIDTH, WIDTH)

    def attn(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads = [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value)]
        return scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out_proj(self.attn(*self.qkv_proj(hidden)[0].chunk(3, dim=-1)))[0]


class Layer(nn.Module):
    """An encoder layer with the names of vLLM's."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


@pytest.mark.parametrize(
    ("images", "tokens", "rows"), [(1, 577, 580), (1, 1, 4), (3, 11, 36), (2, 577, 1154), (1, 64, 64)]
)
@torch.inference_mode()
def test_equals_the_layer(images: int, tokens: int, rows: int) -> None:
    torch.manual_seed(0)
    layer, hidden = Layer(), torch.randn(images, tokens, WIDTH)
    before = hidden.clone()
    expected = layer(hidden)
    result = plain_layer(cast(CLIPEncoderLayer, layer), hidden)
    torch.testing.assert_close(result, expected, atol=TOLERANCE, rtol=0)
    assert layer.self_attn.qkv_proj.rows == rows
    assert torch.equal(hidden, before)


def heads(images: int, tokens: int, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys that share an offset, as a trained model's do, and values, laid out as vLLM's tower has them."""
    torch.manual_seed(0)
    qkv = torch.randn(images, tokens, 3, 4, 64)
    qkv[:, :, 1] += offset * torch.randn(4, 64)
    query, key, value = qkv.bfloat16().permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def error(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("offset", [0.0, 3.0, 10.0])
@pytest.mark.parametrize(("images", "tokens"), [(1, 577), (3, 50), (2, 1)])
def test_about_as_exact_as_the_fused_kernel(images: int, tokens: int, offset: float) -> None:
    query, key, value = heads(images, tokens, offset)
    exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.125)
    fused = error(scaled_dot_product_attention(query, key, value, scale=0.125), exact)
    result = error(centred_attention(query, key, value, 0.125).transpose(1, 2), exact)
    # Rounded logits and rounded keys add two errors of the size of bfloat16's step, 2^-8, to the rounded weights
    # and outputs that both have.
    assert result <= fused + 2**-8


def test_the_offset_of_the_keys_costs_nothing() -> None:
    """Were the keys not centred, their offset would make the logits, and what is rounded of them, larger."""
    errors = []
    for offset in (0.0, 10.0):
        query, key, value = heads(1, 577, offset)
        exact = scaled_dot_product_attention(query.double(), key.double(), value.double(), scale=0.125)
        errors.append(error(centred_attention(query, key, value, 0.125).transpose(1, 2), exact))
    plain = torch.softmax(query @ key.transpose(2, 3) * 0.125, dim=-1) @ value
    assert error(plain, exact) > 3 * errors[1]
    assert errors[1] < 2 * errors[0]


def test_only_for_bfloat16_on_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ficoco_vllm.vision.cpu_layer._has_products", lambda: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert is_faster(torch.zeros(1, dtype=torch.bfloat16))
    assert not is_faster(torch.zeros(1))
    assert not is_faster(torch.zeros(1, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert not is_faster(torch.zeros(1, dtype=torch.bfloat16))


def test_not_where_the_cpu_has_no_products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """There one head after the other takes twenty times as long as the fused kernel."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("ficoco_vllm.vision.cpu_layer._has_products", lambda: False)
    assert not is_faster(torch.zeros(1, dtype=torch.bfloat16))
