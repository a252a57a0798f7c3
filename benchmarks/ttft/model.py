"""A model folder without weights: the true shapes of LLaVA-1.5, the decoder cut to a few layers."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.ttft.quantization import Weights, quantization_config
from ficoco_vllm.reduction.cost import KNOWN_MODELS

CHECKPOINTS = {"7b": "llava-hf/llava-1.5-7b-hf", "13b": "llava-hf/llava-1.5-13b-hf"}


def config(num_layers: int, size: str = "7b") -> dict[str, Any]:
    """LLaVA-1.5's configuration with another number of decoder layers.

    Args:
        num_layers: of the decoder.
        size: one of `CHECKPOINTS`.
    """
    values: dict[str, Any] = copy.deepcopy(dict(KNOWN_MODELS[CHECKPOINTS[size]]))
    values["text_config"]["num_hidden_layers"] = num_layers
    return values


def write(folder: Path, num_layers: int, size: str = "7b", weights: Weights = "plain") -> Path:
    """Write configuration, tokenizer and processor; the weights are made up by vLLM (`load_format="dummy"`).

    Args:
        folder: where to.
        num_layers: of the decoder; the vision tower is whole.
        size: one of `CHECKPOINTS`.
        weights: of the decoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model.path())
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    values = config(num_layers, size) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "dtype": "bfloat16",
    }
    values["text_config"] |= {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    if weights != "plain":
        values["quantization_config"] = quantization_config(weights)
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    side = values["vision_config"]["image_size"]
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=values["vision_config"]["patch_size"],
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder
