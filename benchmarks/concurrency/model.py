"""A LLaVA with the depths and token counts of LLaVA-1.5-7B and the widths of a toy, without weights."""

import json
from pathlib import Path

from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.ttft import model as full_size

WIDTH = 128


def write(folder: Path) -> Path:
    """Write configuration, tokenizer and processor; the weights are made up by vLLM (`load_format="dummy"`).

    What one token takes in the KV cache is smaller than in the real model by the same factor in all layers, so how
    many requests fit into a given part of a cache is the same.

    Args:
        folder: where to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model.path())
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    values = full_size.config(num_layers=32) | {
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "dtype": "bfloat16",
    }
    narrow = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4}
    values["vision_config"] |= narrow | {"projection_dim": WIDTH}
    values["text_config"] |= narrow | {
        "num_key_value_heads": 4,
        "head_dim": WIDTH // 4,
        "vocab_size": len(tokenizer),
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
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
