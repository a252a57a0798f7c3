"""Segments of Qwen3-VL's decoder, M-RoPE positions and deepstack features included, against Hugging Face's in float64.

Layers and attention run vLLM's own code, with dense attention in place of the KV cache, so no engine is needed.
"""

from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.qwen3 import Qwen3Attention, Qwen3DecoderLayer

from ficoco_vllm.config import FicocoConfig
from ficoco_vllm.decoder import decoder as segmented
from ficoco_vllm.decoder.boundary import Part, boundary
from ficoco_vllm.decoder.decoder import ReducingStep, SegmentedDecoder
from ficoco_vllm.decoder.layers import LayerKind
from ficoco_vllm.planning.decoder import DecoderPlanner
from tests.reference.algorithm1 import plain_norm
from tests.reference.algorithm2 import Shown, unroll

pytestmark = pytest.mark.compat

LAYERS, H, KV, d, D = 8, 4, 2, 32, 128
# Text, an image of 5 x 7 tokens, text, one of 4 x 6, text: time, row and column of each token.
GRIDS = ((5, 7), (4, 6))
TEXTS = (6, 4, 9)
ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [6, 5, 5],
    "mrope_interleaved": True,
}
# float32 against float64
TOLERANCE = 1e-4


class Norm(nn.Module):
    """RMS norm as vLLM's layers call it."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return plain_norm(self.norm, hidden)
        total = hidden + residual
        return plain_norm(self.norm, total), total


class Attention(nn.Module):
    """Qwen3's attention of vLLM on Hugging Face's weights."""

    forward = Qwen3Attention.forward

    def __init__(self, attention: Any, rotary: Any) -> None:
        super().__init__()
        self.q_size, self.kv_size, self.head_dim, self.scaling = H * d, KV * d, d, d**-0.5
        self.rotary_emb: Any = rotary.forward_native
        self.q_norm, self.k_norm = Norm(attention.q_norm), Norm(attention.k_norm)
        weights = torch.cat([getattr(attention, f"{name}_proj").weight for name in "qkv"])
        self.qkv_proj: Any = lambda x: (x @ weights.T, None)
        self.o_proj: Any = lambda x: (attention.o_proj(x), None)

    def attn(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal, over all rows of the step, which are one prompt."""
        query, key, value = (part.view(len(part), -1, d).transpose(0, 1) for part in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(0, 1).flatten(1)


class Layer(nn.Module):
    """Qwen3's layer of vLLM."""

    forward = Qwen3DecoderLayer.forward

    def __init__(self, layer: Any, rotary: Any) -> None:
        super().__init__()
        self.input_layernorm = Norm(layer.input_layernorm)
        self.post_attention_layernorm = Norm(layer.post_attention_layernorm)
        self.self_attn, self.mlp = Attention(layer.self_attn, rotary), layer.mlp


@pytest.fixture(scope="module")
def config() -> Qwen3VLTextConfig:
    return Qwen3VLTextConfig(
        vocab_size=8,
        hidden_size=D,
        intermediate_size=192,
        num_hidden_layers=LAYERS,
        num_attention_heads=H,
        num_key_value_heads=KV,
        head_dim=d,
        rope_parameters=ROPE,
        attn_implementation="eager",
    )


@pytest.fixture(scope="module")
def models(config: Qwen3VLTextConfig) -> tuple[Qwen3VLTextModel, Qwen3VLTextModel]:
    """Random weights, in float32 and in float64."""
    torch.manual_seed(0)
    model = Qwen3VLTextModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.12 if parameter.dim() > 1 else 0.4)
    exact = Qwen3VLTextModel(config).eval()
    exact.load_state_dict(model.state_dict())
    exact = exact.double()
    for module in exact.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(plain_norm, module)
    return model.requires_grad_(False), exact.requires_grad_(False)


@pytest.fixture(scope="module")
def positions() -> Tensor:
    """(3, T), as M-RoPE numbers them: text goes on after the longer side of an image."""
    pieces, following = [torch.arange(TEXTS[0]).expand(3, -1)], TEXTS[0]
    for (rows, columns), text in zip(GRIDS, TEXTS[1:], strict=True):
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        time = torch.zeros_like(row)
        pieces.append(following + torch.stack([time, row, column]).flatten(1))
        following += max(rows, columns)
        pieces.append(following + torch.arange(text).expand(3, -1))
        following += text
    return torch.cat(pieces, dim=1)


IMAGES = [(TEXTS[0], 35), (TEXTS[0] + 35 + TEXTS[1], 24)]


def run(
    monkeypatch: pytest.MonkeyPatch,
    model: Any,
    config: Any,
    num_segments: int,
    positions: Tensor,
    hidden: Tensor,
    deepstack: list[Tensor],
    keep: int,
    kind: LayerKind | None = None,
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """Output of a step with one prompt, and visual tokens in each segment."""
    settings = FicocoConfig.parse({"method": "ficoco-l", "num_segments": num_segments, "windows": "off"})
    planner = DecoderPlanner.shared(settings, LAYERS, 35, first_layer=len(deepstack))
    plan = planner.plan(len(hidden), IMAGES, {"ficoco_keep": keep})
    parts = [Part(plan, 0, len(hidden))]
    boundaries = tuple(
        boundary([0, len(hidden)], parts, segment, lambda _: False) for segment in range(num_segments - 1)
    )
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(d, max_position=4096, rope_parameters=ROPE, dtype=torch.float32)
    layers = [Layer(layer, rotary) for layer in model.layers]
    monkeypatch.setattr(segmented, "get_tensor_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(segmented, "get_forward_context", lambda: SimpleNamespace(slot_mapping={}))
    if kind is not None:
        monkeypatch.setattr(segmented, "LAYER_KINDS", {config.model_type: kind})
    decoder = SegmentedDecoder(
        SimpleNamespace(layers=layers, norm=Norm(model.norm), config=config), planner, (1, 35)
    )
    step = ReducingStep(boundaries, {}, {}, (None,) * num_segments)
    return decoder(positions, hidden, step, deepstack), plan.counts


@pytest.mark.parametrize("num_segments", [8, 4, 2])
@pytest.mark.parametrize("num_levels", [0, 1, 3])
@pytest.mark.parametrize("keep", [20, 5])
def test_equals_hugging_face(
    monkeypatch: pytest.MonkeyPatch,
    models: tuple[Any, Any],
    config: Any,
    positions: Tensor,
    num_segments: int,
    num_levels: int,
    keep: int,
) -> None:
    """Survivors keep their rows of positions; features are added to all tokens, before the first reduction."""
    hidden, deepstack, expected = case(models, positions, num_segments, num_levels, keep)
    result, counts = run(monkeypatch, models[0], config, num_segments, positions, hidden, deepstack, keep)
    left = result.abs().sum(dim=1) > 0
    assert int(left.sum()) == len(hidden) - 35 - 24 + sum(counts[-1])
    torch.testing.assert_close(result[left].double(), expected[left], atol=TOLERANCE, rtol=0)


def case(
    models: tuple[Any, Any], positions: Tensor, num_segments: int, num_levels: int, keep: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Embeddings, deepstack features of the visual tokens, and the oracle's output."""
    generator = torch.Generator().manual_seed(num_levels)
    T = positions.shape[1]
    hidden = torch.randn(T, D, generator=generator)
    visual = torch.zeros(T, 1)
    for offset, length in IMAGES:
        visual[offset : offset + length] = 1
    deepstack = [torch.randn(T, D, generator=generator) * visual for _ in range(num_levels)]
    size = LAYERS // num_segments
    # FiCoCo-L starts in layer 3 of 32, or after the last features; it reduces in the last layer of a segment.
    ends = [layer for layer in range(size - 1, LAYERS - 1, size) if layer >= num_levels]
    ends = [end for end in ends if end >= min(ends, key=lambda end: abs(end - 3))]
    images: list[Any] = []
    for _, length in IMAGES:
        lost = [(length - keep) // len(ends) + (i < (length - keep) % len(ends)) for i in range(len(ends))]
        left = {end: length - sum(lost[: i + 1]) for i, end in enumerate(ends)}
        images.append(Shown(Image.new("RGB", (1, 1)), length, left))
    spans = [range(offset, offset + length) for offset, length in IMAGES]
    features = [level.double() for level in deepstack]
    of_whole = positions[:, None]
    expected = unroll(models[1], "ficoco-l", hidden.double(), of_whole, T, spans, images, deepstack=features)
    return hidden, deepstack, expected


@pytest.mark.parametrize("fault", ["positions", "deepstack", "norms"])
def test_the_check_can_fail(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Any, Any], config: Any, positions: Tensor, fault: str
) -> None:
    """Negative controls: positions numbered anew, features in the wrong order, no norms of heads."""
    hidden, deepstack, expected = case(models, positions, 4, 3, 20)
    kind = None
    if fault == "positions":
        positions = torch.arange(len(hidden)).expand(3, -1)
    elif fault == "deepstack":
        deepstack = deepstack[::-1]
    else:
        kind = LayerKind()
    result, _ = run(monkeypatch, models[0], config, 4, positions, hidden, deepstack, 20, kind=kind)
    assert (result[-1].double() - expected[-1]).abs().max() > 100 * TOLERANCE
