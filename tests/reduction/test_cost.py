"""The cost model against hand arithmetic, against Hugging Face's LLaVA, and against the paper."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ficoco_vllm.reduction.cost import (
    KNOWN_MODELS,
    TilePlan,
    TokenPlan,
    constant,
    estimate,
    estimate_prompt,
    model_shape,
    paper,
    speedup,
    unreduced,
)
from ficoco_vllm.reduction.cost.llm_viewer import footprint_bytes, traffic_bytes
from ficoco_vllm.reduction.cost.memory import num_parameters, to_bytes
from ficoco_vllm.reduction.cost.paper_schedule import decoder_tokens, tower_tokens

LLAVA_7B = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"])
LLAVA_13B = model_shape(KNOWN_MODELS["llava-hf/llava-1.5-13b-hf"])
# Grouped-query attention, and feature layer -1, so that transformers runs no layer that we do not count.
TINY: dict[str, Any] = {
    "model_type": "llava",
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": 100,
    },
}


def test_counts_what_hugging_face_computes() -> None:
    """FLOPs equal PyTorch's own counter on a real forward pass; parameters equal those of the model."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(**TINY, image_token_index=99, attn_implementation="eager")
    model = LlavaForConditionalGeneration(config).eval()
    prompt = torch.tensor([[1] * 5 + [99] * 16 + [2] * 2])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(input_ids=prompt, pixel_values=torch.zeros(1, 3, 16, 16), logits_to_keep=1)

    shape = model_shape(TINY)
    cost = estimate(shape, unreduced(shape), num_text_tokens=7)
    assert cost.total_flops == counter.get_total_flops()
    # CLIP's last norm belongs to the pooled output, which LLaVA does not use.
    assert num_parameters(shape) == sum(weight.numel() for weight in model.parameters()) - 2 * 32


def test_flops_of_a_reduced_prefill_by_hand() -> None:
    shape = model_shape(TINY)
    # 16 patches; the second tower layer drops 6, the first decoder layer 4 more; 3 text tokens.
    plan = TokenPlan.whole(encoder=(16, 16, 10, 10), decoder=(10, 6, 6))
    cost = estimate(shape, plan, num_text_tokens=3)
    patches = 16 * (3 * 4 * 4) * 32
    projections = (17 + 17 + 11) * 4 * 32 * 32
    attention = (17**2 + 17**2 + 11**2) * 2 * 32
    mlp = (17 + 11 + 11) * 2 * 32 * 48
    assert cost.tower_flops == 2 * (patches + projections + attention + mlp)
    assert cost.projector_flops == 2 * 10 * (32 * 64 + 64 * 64)
    projections = (13 + 9) * (64 * 64 + 2 * 64 * 32 + 64 * 64)
    attention = (13**2 + 9**2) * 2 * 64
    mlp = (9 + 9) * 3 * 64 * 96
    assert cost.decoder_flops == 2 * (projections + attention + mlp + 64 * 100)
    eq18 = 16**2 + 2 * 16 + 6 * (10 + 2 * 32 + 1) + 32
    eq19 = 2 * (10**2 + 2 * 10) + 4 * (6 + 2 * 64 + 1) + 64
    assert cost.reduction_flops == eq18 + eq19
    assert cost.total_flops == cost.tower_flops + cost.projector_flops + cost.decoder_flops + eq18 + eq19
    # Keys and values of two heads of width 16, 2 bytes each; the reducing layer writes all that enter it.
    assert cost.kv_bytes_per_layer == (13 * 2 * 32 * 2, 9 * 2 * 32 * 2)


def test_images_are_reduced_alone_and_share_the_prompt() -> None:
    shape = model_shape(TINY)
    plan = TokenPlan.whole(encoder=(16, 16, 10, 10), decoder=(10, 6, 6))
    one = estimate(shape, plan, num_text_tokens=3)
    two = estimate(shape, plan, num_text_tokens=3, num_images=2)
    assert two.tower_flops == 2 * one.tower_flops
    assert two.reduction_flops == 2 * one.reduction_flops
    assert two.kv_bytes_per_layer == ((2 * 10 + 3) * 128, (2 * 6 + 3) * 128)


def test_images_of_different_plans_add_up() -> None:
    shape = model_shape(TINY)
    plan, stock = TokenPlan.whole((16, 16, 10, 10), (10, 6, 6)), unreduced(shape)
    mixed = estimate_prompt(shape, {plan: 2, stock: 1}, num_text_tokens=3)
    reduced, whole = (estimate(shape, one, num_text_tokens=3) for one in (plan, stock))
    assert mixed.tower_flops == 2 * reduced.tower_flops + whole.tower_flops
    assert mixed.reduction_flops == 2 * reduced.reduction_flops
    assert mixed.kv_bytes_per_layer == ((2 * 10 + 16 + 3) * 128, (2 * 6 + 16 + 3) * 128)


def test_an_image_in_tiles() -> None:
    """A tile with padding: the tower sees all 16 patches up to the first layer that reduces, then the 12 that count."""
    tile = TilePlan.of(16, (12, 12, 8, 8), 8)
    assert tile.layers == ((16, 16), (12, 8), (8, 8))
    assert TilePlan.of(16, (12,) * 4, 12).layers == ((16, 16),) * 3
    shape = model_shape(TINY)
    whole = TokenPlan.whole((16, 16, 8, 8), (8, 8, 8))
    two = estimate(shape, TokenPlan((tile, whole.tiles[0]), 16, (17, 17, 17)), num_text_tokens=3)
    one = estimate(shape, whole, num_text_tokens=3)
    assert one.tower_flops < two.tower_flops < 2 * one.tower_flops
    assert two.projector_flops == 2 * one.projector_flops
    assert two.kv_bytes_per_layer == ((17 + 3) * 128,) * 2


def test_memory_of_llava_7b() -> None:
    cost = estimate(LLAVA_7B, unreduced(LLAVA_7B), num_text_tokens=60)
    # The published checkpoint has 7,063,427,072 parameters; its 24th tower layer and last norm are never run.
    last_layer = 4 * (1024 * 1024 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert cost.weight_bytes == 2 * (7_063_427_072 - last_layer - 2 * 1024)
    assert cost.kv_bytes == 636 * 32 * 2 * 4096 * 2 == 333_447_168
    # The gated MLP's three inner tensors and the residual stream.
    assert cost.activation_bytes == 2 * 636 * (4096 + 3 * 11008)
    assert cost.memory_bytes == cost.weight_bytes + cost.kv_bytes + cost.activation_bytes


@pytest.mark.parametrize(("dtype", "per_element"), [("fp16", 2), ("int8", 1), ("int4", 0.5)])
def test_bytes_follow_the_data_type(dtype: str, per_element: float) -> None:
    assert to_bytes(1000, dtype) == 1000 * per_element
    assert to_bytes(3, dtype) == {2: 6, 1: 3, 0.5: 2}[per_element]
    full = estimate(LLAVA_7B, unreduced(LLAVA_7B), num_text_tokens=60)
    cost = estimate(LLAVA_7B, unreduced(LLAVA_7B), num_text_tokens=60, dtype=dtype)
    assert cost.kv_bytes * 2 == full.kv_bytes * per_element
    assert cost.decoder_flops == full.decoder_flops


@pytest.mark.parametrize(
    ("N", "S", "M", "D", "H"), [(576, 43, 60, 1024, 4096), (7, 3, 2, 5, 11), (64, 63, 9, 8, 32)]
)
def test_equations_as_printed(N: int, S: int, M: int, D: int, H: int) -> None:
    N1, P, P1, T = N - S, N + M, N - S + M, N - S
    before, after = (
        4 * N * D**2 + 2 * N**2 * D + 2 * N * D * H,
        4 * N1 * D**2 + 2 * N1**2 * D + 2 * N1 * D * H,
    )
    assert paper.layer_flops(N, D, H) == before
    assert paper.layer_saving(N, S, D, H) == before - after
    eq16 = 4 * S * D**2 + 2 * (N * S - S**2) * D + 2 * S * D * H
    assert paper.encoder_saving_as_printed(N, S, D, H) == eq16
    assert before - after - eq16 == 2 * N * S * D  # the missing factor 2
    before, after = (
        4 * P * D**2 + 2 * P**2 * D + 2 * P * D * H,
        4 * P1 * D**2 + 2 * P1**2 * D + 2 * P1 * D * H,
    )
    assert paper.layer_saving(P, S, D, H) == before - after
    eq17 = 4 * S * D**2 + 2 * (2 * N * S - S**2) * D + 2 * S * D * H
    assert paper.decoder_saving_as_printed(N, S, D, H) == eq17
    assert before - after - eq17 == 4 * M * S * D  # the missing text tokens
    assert paper.encoder_overhead(N, S, D) == N**2 + 2 * N + S * (T + 2 * D + 1) + D
    assert paper.decoder_overhead(N, S, D) == 2 * (N**2 + 2 * N) + S * (T + 2 * D + 1) + D
    assert paper.encoder_overhead(N, 0, D) == paper.decoder_overhead(N, 0, D) == 0


def test_tower_counts_of_the_paper() -> None:
    """64 of 576: twelve reductions from the 12th layer on, eight of 43 and four of 42."""
    counts = tower_tokens(LLAVA_7B, 64)
    assert counts == (576,) * 12 + (533, 490, 447, 404, 361, 318, 275, 232, 190, 148, 106, 64)


@pytest.mark.parametrize(
    ("keep", "schedule", "counts"),
    [
        (16, "one-shot", (32, 32, 32, 32, 16, 16, 16, 16, 16)),
        (22, "even", (32, 32, 32, 32, 30, 28, 26, 24, 22)),
        (1, "geometric", (32, 32, 32, 32, 16, 8, 4, 2, 1)),
        (32, "even", (32,) * 9),
    ],
)
def test_decoder_counts_of_the_paper(keep: int, schedule: str, counts: tuple[int, ...]) -> None:
    shape = replace(LLAVA_7B, decoder=replace(LLAVA_7B.decoder, num_layers=8))
    assert decoder_tokens(shape, 32, keep, schedule) == counts


def in_tower(keep: int) -> TokenPlan:
    """FiCoCo-V."""
    return TokenPlan.whole(tower_tokens(LLAVA_7B, keep), (keep,) * 33)


def test_cost_falls_with_keep() -> None:
    previous = None
    for keep in (576, 575, 300, 64, 63, 2, 1):
        cost = estimate(LLAVA_7B, in_tower(keep), num_text_tokens=60)
        if previous is not None:
            for name in ("tower_flops", "projector_flops", "decoder_flops", "kv_bytes", "llm_traffic_bytes"):
                assert getattr(cost, name) < getattr(previous, name), (keep, name)
            # A peak: at small budgets it is that of the tower's first layers, which see every patch.
            assert cost.activation_bytes <= previous.activation_bytes
            gain = speedup(cost, previous)
            assert gain.compute_bound > 1
            assert gain.memory_bound > 1
        previous = cost


# The paper prints one digit. At 64 tokens its figure is that of 56 (docs/paper-tables.md, note a).
@pytest.mark.parametrize(
    ("keep", "tflops", "tolerance"), [(64, 1.5, 0.08), (128, 2.4, 0.03), (192, 3.3, 0.01)]
)
def test_flops_settings_of_table_3(keep: int, tflops: float, tolerance: float) -> None:
    cost = estimate(LLAVA_7B, in_tower(keep), num_text_tokens=60)
    assert cost.decoder_flops / 1e12 == pytest.approx(tflops, rel=tolerance)


def _viewer(shape: Any, n: int, weight_bits: int, act_bits: int, kv_bits: int) -> tuple[float, float]:
    """LLM-Viewer's prefill of one token count, operator by operator: traffic and footprint in GB."""
    D, H, V, heads = shape.hidden, shape.mlp, shape.vocab, shape.num_heads
    linear = {
        "q": (D, D),
        "k": (D, D),
        "v": (D, D),
        "o": (D, D),
        "gate": (D, H),
        "up": (D, H),
        "down": (H, D),
    }
    weights = sum(rows * columns for rows, columns in linear.values())
    load = sum(n * rows for rows, _ in linear.values())
    store = sum(n * columns for name, (_, columns) in linear.items() if name not in "kv")
    scores = heads * n * n
    store += scores + n * D + scores  # query times key, weighted values, softmax
    load += scores + scores  # softmax, weighted values
    for _ in ("attention norm", "MLP norm", "attention residual", "MLP residual"):
        load, store = load + n * D, store + n * D
    load, store = load + 2 * n * D, store + n * D  # activation
    kv_store, kv_load = 2 * n * D, 2 * n * D + n * D
    head = D * V * weight_bits + (D + V) * act_bits
    acts, kv = (load + store) * act_bits, (kv_store + kv_load) * kv_bits
    traffic = shape.num_layers * (weights * weight_bits + acts + kv) + head
    footprint = shape.num_layers * (weights * weight_bits + kv_store * kv_bits) + store * act_bits
    return traffic / 8e9, footprint / 8e9


@pytest.mark.parametrize("shape", [LLAVA_7B, LLAVA_13B])
@pytest.mark.parametrize("num_tokens", [1, 124, 636])
@pytest.mark.parametrize(("dtype", "bits"), [("fp16", 16), ("int8", 8), ("int4", 4)])
def test_accounting_of_llm_viewer(shape: Any, num_tokens: int, dtype: str, bits: int) -> None:
    traffic, footprint = _viewer(shape.decoder, num_tokens, bits, bits, bits)
    tokens = [num_tokens] * (shape.decoder.num_layers + 1)
    assert traffic_bytes(shape.decoder, tokens, dtype) / 1e9 == pytest.approx(traffic, rel=1e-9)
    assert footprint_bytes(shape.decoder, tokens, dtype) / 1e9 == pytest.approx(footprint, rel=1e-9)
    fused = traffic_bytes(shape.decoder, tokens, "int8", fused_attention=True)
    scores = shape.decoder.num_heads * num_tokens**2
    assert traffic_bytes(shape.decoder, tokens, "int8") - fused == shape.decoder.num_layers * 4 * scores


def test_what_the_document_says_of_mixed_widths() -> None:
    """Notes (d) and (e) of docs/paper-tables.md."""
    assert round(_viewer(LLAVA_7B.decoder, 124, 8, 16, 8)[0], 1) == 7.8
    assert round(_viewer(LLAVA_7B.decoder, 124, 4, 16, 4)[0], 1) == 4.4
    assert round(_viewer(LLAVA_7B.decoder, 636, 4, 4, 16)[0], 1) == 6.2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "llama", r"model_type: got 'llama', allowed: llava, llava_next"),
        (("vision_feature_select_strategy",), "full", r"vision_feature_select_strategy: got 'full'"),
        (("vision_feature_layer",), 4, r"vision_feature_layer: got 4, allowed: one of -3..-1, 1..3"),
        (("vision_feature_layer",), [-2, -1], r"vision_feature_layer: got \[-2, -1\]"),
        (("vision_config",), None, r"vision_config: got None"),
        (("vision_config", "model_type"), "siglip_vision_model", r"vision_config.model_type: got 'siglip"),
        (
            ("vision_config", "patch_size"),
            17,
            r"vision_config.patch_size: got 17, allowed: 1 to image_size = 16",
        ),
        (("text_config", "hidden_size"), "64", r"text_config.hidden_size: got '64', allowed: an integer"),
        (("text_config", "num_hidden_layers"), 0, r"text_config.num_hidden_layers: got 0"),
        (
            ("text_config", "num_attention_heads"),
            5,
            r"text_config.hidden_size: got 64, allowed: a multiple of",
        ),
        (
            ("text_config", "num_key_value_heads"),
            3,
            r"text_config.num_attention_heads: got 4, allowed: a multiple",
        ),
        (("text_config", "vocab_size"), True, r"text_config.vocab_size: got True"),
    ],
)
def test_errors_of_a_configuration(path: tuple[str, ...], value: Any, message: str) -> None:
    config = json.loads(json.dumps(TINY))
    section = config if len(path) == 1 else config[path[0]]
    section[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        model_shape(config)


def test_fields_that_transformers_defaults_may_be_left_out() -> None:
    """The published 7B configuration names none of the decoder's sizes but the vocabulary."""
    config = {
        **KNOWN_MODELS["llava-hf/llava-1.5-7b-hf"],
        "text_config": {"model_type": "llama", "vocab_size": 32064},
    }
    assert model_shape(config) == LLAVA_7B
    config["text_config"] = {"model_type": "mistral", "vocab_size": 32064}
    with pytest.raises(ValueError, match=r"text_config.num_attention_heads: got None"):
        model_shape(config)


def test_plans_that_do_not_fit_are_refused() -> None:
    plan = constant(LLAVA_7B, 64)
    with pytest.raises(ValueError, match="num_text_tokens: got 0"):
        estimate(LLAVA_7B, plan, num_text_tokens=0)
    with pytest.raises(ValueError, match="num_images: got 0"):
        estimate(LLAVA_7B, plan, num_text_tokens=1, num_images=0)
    with pytest.raises(ValueError, match="dtype: got 'fp8', allowed: fp16, int8, int4"):
        estimate(LLAVA_7B, plan, num_text_tokens=1, dtype="fp8")
    with pytest.raises(ValueError, match="decoder: got 33 counts, allowed: 41"):
        estimate(LLAVA_13B, plan, num_text_tokens=1)
    with pytest.raises(ValueError, match="token counts: got 65 after 64, allowed: 0 to 64"):
        estimate(LLAVA_7B, replace(plan, decoder=(64,) * 32 + (65,)), num_text_tokens=1)


def test_the_document_is_current() -> None:
    """Also fails where a figure is more than 5% off and has no note, or has a note and needs none."""
    command = [sys.executable, "-m", "ficoco_vllm.benchmarks.efficiency.paper_tables", "--check"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
