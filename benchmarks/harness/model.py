"""Model folders without weights: the shapes of LLaVA-1.5, the decoder cut to a few layers, or a toy's width."""

import copy
import json
from pathlib import Path
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness.quantization import Weights, quantization_config
from ficoco_vllm.reduction.cost import KNOWN_MODELS

CHECKPOINTS = {"7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf"}
# Decoder layers of the whole models.
WHOLE_MODELS = {"7b": 32, "13b": 40}
# Visual tokens of an image without reduction.
PATCHES = 576
NARROW_WIDTH = 128


def config(num_layers: int, size: str = "7b") -> dict[str, Any]:
    """Configuration of a LLaVA-1.5, by its size, or of another of `KNOWN_MODELS`, with `num_layers` decoder layers."""
    values: dict[str, Any] = copy.deepcopy(dict(KNOWN_MODELS[CHECKPOINTS.get(size, size)]))
    values["text_config"]["num_hidden_layers"] = num_layers
    return values


def write(
    folder: Path, num_layers: int, size: str = "7b", weights: Weights = "plain", *, narrow: bool = False
) -> Path:
    """Write configuration, tokenizer and processor; vLLM makes up the weights (`load_format="dummy"`).

    The vision tower is whole, the decoder has `num_layers` layers. With `narrow` both have a toy's width: a token takes
    less of the KV cache by the same factor in all layers, so a given share of a cache holds as many requests.
    """
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(demo_model.path())
    values = config(num_layers, size) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": processor.image_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "dtype": "bfloat16",
    }
    values["text_config"] |= {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    if narrow:
        widths = {
            "hidden_size": NARROW_WIDTH,
            "intermediate_size": 2 * NARROW_WIDTH,
            "num_attention_heads": 4,
        }
        values["vision_config"] |= widths | {"projection_dim": NARROW_WIDTH}
        heads = {"num_key_value_heads": 4, "head_dim": NARROW_WIDTH // 4}
        values["text_config"] |= {**widths, **heads, "vocab_size": len(processor.tokenizer)}
    if weights != "plain":
        values["quantization_config"] = quantization_config(weights)
    side = values["vision_config"]["image_size"]
    processor.image_processor.size = {"shortest_edge": side}
    processor.image_processor.crop_size = {"height": side, "width": side}
    processor.patch_size = values["vision_config"]["patch_size"]
    processor.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    return folder
