"""The cost model against Hugging Face's InternVL and Qwen3-VL, and published sizes."""

import re
from typing import Any

import pytest

from ficoco_vllm.reduction.cost import KNOWN_MODELS, TilePlan, TokenPlan, estimate, model_shape
from ficoco_vllm.reduction.cost.memory import num_parameters

DECODER = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 200,
}
INTERNVL: dict[str, Any] = {
    "model_type": "internvl",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [32, 32],
        "patch_size": [4, 4],
        "attention_bias": True,
    },
    "text_config": {"model_type": "qwen2", "tie_word_embeddings": False, **DECODER},
}
LARGE_INTERNVIT: dict[str, Any] = {
    **INTERNVL,
    "vision_config": {
        **INTERNVL["vision_config"],
        "attention_bias": False,
        "use_qk_norm": True,
        "norm_type": "rms_norm",
    },
    "text_config": {"model_type": "qwen3", "head_dim": 24, "tie_word_embeddings": False, **DECODER},
}
QWEN3_VL: dict[str, Any] = {
    "model_type": "qwen3_vl",
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "qwen3_vl_vision",
        "depth": 4,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": 4,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 2],
    },
    "text_config": {
        "model_type": "qwen3_vl_text",
        "head_dim": 24,
        "rope_parameters": {"rope_type": "default", "mrope_section": [6, 3, 3], "rope_theta": 1e4},
        **DECODER,
    },
}
QWEN3_VL_MOE: dict[str, Any] = {
    **QWEN3_VL,
    "model_type": "qwen3_vl_moe",
    "vision_config": {**QWEN3_VL["vision_config"], "model_type": "qwen3_vl_moe_vision"},
    "text_config": {
        **QWEN3_VL["text_config"],
        "model_type": "qwen3_vl_moe_text",
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "tie_word_embeddings": False,
    },
}
# Model parameters in billions, as Hugging Face counts the tensors of each checkpoint.
BILLIONS = {
    "OpenGVLab/InternVL3-8B-hf": 7.94,
    "OpenGVLab/InternVL3_5-8B-HF": 8.53,
    "Qwen/Qwen3-VL-2B-Instruct": 2.13,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "Qwen/Qwen3-VL-32B-Instruct": 33.4,
}


def counted(model: Any, **inputs: Any) -> int:
    """FLOPs of a forward pass by PyTorch's counter."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(**inputs, logits_to_keep=1)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("config", [INTERNVL, LARGE_INTERNVIT], ids=["300M", "6B"])
def test_internvl(config: dict[str, Any]) -> None:
    """Three tiles of 64 patches in 16 units."""
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    model = InternVLForConditionalGeneration(
        InternVLConfig(**config, image_token_id=199, attn_implementation="eager")
    )
    prompt = torch.tensor([[1] * 5 + [199] * 48 + [2] * 2])
    flops = counted(model, input_ids=prompt, pixel_values=torch.zeros(3, 3, 32, 32))
    shape = model_shape(config)
    assert shape.tower.num_units == 16
    tile = TilePlan.of(16, (16,) * 4, 16)
    plan = TokenPlan((tile,) * 3, 48, (48,) * 3)
    assert estimate(shape, plan, num_text_tokens=7).total_flops == flops
    assert num_parameters(shape) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("config", [QWEN3_VL, QWEN3_VL_MOE], ids=["dense", "experts"])
def test_qwen3_vl(config: dict[str, Any]) -> None:
    """One image of 8 x 12 patches in 24 units, with features of two layers for the decoder."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    tokens = {
        "image_token_id": 199,
        "video_token_id": 198,
        "vision_start_token_id": 197,
        "vision_end_token_id": 196,
    }
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(**config, **tokens), attn_implementation="eager", experts_implementation="eager"
    )
    prompt = torch.tensor([[1] * 4 + [197] + [199] * 24 + [2] * 2])
    flops = counted(
        model,
        input_ids=prompt,
        mm_token_type_ids=(prompt == 199).int(),
        pixel_values=torch.zeros(96, 2 * 3 * 16),
        image_grid_thw=torch.tensor([[1, 8, 12]]),
    )
    shape = model_shape(config)
    plan = TokenPlan.whole((24,) * 5, (24,) * 3)
    assert estimate(shape, plan, num_text_tokens=7).total_flops == flops
    assert num_parameters(shape) == sum(weight.numel() for weight in model.parameters())


def test_a_reduced_image_of_qwen3_vl_by_hand() -> None:
    """Units leave in the third layer, after whose output the deepstack's second run comes."""
    shape = model_shape(QWEN3_VL)
    cost = estimate(shape, TokenPlan.whole((24, 24, 24, 10, 10), (10, 10, 10)), num_text_tokens=3)
    patches = 96 * (2 * 3 * 16) * 32
    projections = (96 + 96 + 96 + 40) * 4 * 32 * 32
    attention = (3 * 96**2 + 40**2) * 2 * 32
    mlp = (96 + 96 + 40 + 40) * 2 * 32 * 48
    assert cost.tower_flops == 2 * (patches + projections + attention + mlp)
    assert cost.projector_flops == 2 * (24 + 10 + 10) * (128 * 128 + 128 * 64)
    assert cost.kv_bytes_per_layer == (13 * 2 * 2 * 24 * 2,) * 2


@pytest.mark.parametrize(
    "name",
    ["Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct", "OpenGVLab/InternVL3_5-30B-A3B"],
)
def test_parameters_of_mixtures_of_experts(name: str) -> None:
    """As transformers makes them, without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = dict(KNOWN_MODELS[name])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model(config.pop("model_type"), **config)
        )
    counted = sum(weight.numel() for weight in model.parameters())
    assert num_parameters(model_shape(KNOWN_MODELS[name])) == counted


def test_weights_that_a_step_of_experts_reads() -> None:
    """Against the mean over many choices at random: one token reads two of six experts, many read all."""
    import torch

    decoder = model_shape(QWEN3_VL_MOE).decoder
    expert, router = 3 * 64 * 40, 64 * 6
    generator = torch.Generator().manual_seed(0)
    for num_tokens in (1, 3, 200):
        choices = torch.rand(4000, num_tokens, 6, generator=generator).topk(2).indices.flatten(1)
        read = torch.zeros(4000, 6).scatter(1, choices, 1.0).sum(1).mean()
        expected = float(read) * expert + router
        assert decoder.mlp_weights(num_tokens) == pytest.approx(expected, rel=0.01)
    assert decoder.mlp_weights() == 6 * expert + router


@pytest.mark.parametrize("name", BILLIONS)
def test_parameters_of_published_checkpoints(name: str) -> None:
    assert num_parameters(model_shape(KNOWN_MODELS[name])) / 1e9 == pytest.approx(BILLIONS[name], rel=0.002)


@pytest.mark.parametrize(
    ("config", "section", "field", "value", "part"),
    [
        (INTERNVL, None, "downsample_ratio", 0.3, "downsample_ratio: got 0.3, allowed: 0.5"),
        (INTERNVL, "vision_config", "image_size", [32, 36], "vision_config.image_size: got [32, 36]"),
        (INTERNVL, "vision_config", "image_size", 36, "allowed: a multiple of 8 (a unit)"),
        (
            INTERNVL,
            "text_config",
            "model_type",
            "gpt_oss",
            "text_config.model_type: got 'gpt_oss', allowed: qwen2",
        ),
        (QWEN3_VL, "vision_config", "deepstack_visual_indexes", [4], "allowed: layers from 0 to 3"),
        (
            QWEN3_VL,
            "vision_config",
            "out_hidden_size",
            32,
            "vision_config.out_hidden_size: got 32, allowed: 64",
        ),
        (QWEN3_VL, "vision_config", "spatial_merge_size", 0, "vision_config.spatial_merge_size: got 0"),
        (
            QWEN3_VL_MOE,
            "text_config",
            "mlp_only_layers",
            [0],
            "text_config.mlp_only_layers: got [0], allowed: [] (experts in all layers)",
        ),
        (QWEN3_VL_MOE, "text_config", "num_experts_per_tok", 7, "got 7, allowed: an integer from 1 to 6"),
        (QWEN3_VL, None, "model_type", "qwen4_vl", "allowed: llava, llava_next, internvl, qwen3_vl"),
    ],
)
def test_wrong_sizes_are_refused(
    config: dict[str, Any], section: str | None, field: str, value: Any, part: str
) -> None:
    wrong = (
        {**config, field: value}
        if section is None
        else {**config, section: {**config[section], field: value}}
    )
    with pytest.raises(ValueError, match=re.escape(part)):
        model_shape(wrong)
