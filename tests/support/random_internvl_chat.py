"""An InternVL with random weights in OpenGVLab's own format; the same in Hugging Face's lies in a folder of it."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from tests.support import configuration_internvl_chat, random_internvl
from tests.support.random_internvl import CHAT_TEMPLATE, IMAGE, MOST_TILES, PATCH, TILE

# In prompts, where the other format has `<IMG_CONTEXT>`.
PLACEHOLDER = "<image>"
# Folder in that of the model with the same weights in Hugging Face's format.
HF = "hf"


def build(folder: Path, *, decoder_layers: int = 3) -> Path:
    """Write a random model in the layout of OpenGVLab's checkpoints.

    Its InternViT has biases of queries, keys and values as the one with 300M parameters, and norms of queries and keys
    as the one with 6B.

    Args:
        folder: where to.
        decoder_layers: depth of the language model.
    """
    random_internvl.build(
        folder / HF, decoder_layers=decoder_layers, attention_bias=True, use_mean_pooling=True
    )
    tokenizer = random_internvl.make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace(IMAGE, PLACEHOLDER)
    tokenizer.save_pretrained(folder)
    model = InternVLForConditionalGeneration.from_pretrained(folder / HF, dtype=torch.float32)
    save_file(_weights(model), folder / "model.safetensors", metadata={"format": "pt"})
    source = Path(configuration_internvl_chat.__file__)
    shutil.copy(source, folder / source.name)
    vision = model.config.vision_config
    config = {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": TILE,
        "llm_config": model.config.text_config.to_dict(),
        "max_dynamic_patch": MOST_TILES,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "tie_word_embeddings": False,
        "use_thumbnail": True,
        "vision_config": {
            "architectures": ["InternVisionModel"],
            "model_type": "intern_vit_6b",
            "hidden_act": "gelu",
            "hidden_size": vision.hidden_size,
            "image_size": TILE,
            "initializer_factor": 1.0,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "norm_type": "layer_norm",
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": PATCH,
            "qk_normalization": True,
            "qkv_bias": True,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Names within a layer of InternViT: Hugging Face's to OpenGVLab's.
_LAYER = {
    "attention.projection_layer": "attn.proj",
    "attention.q_norm": "attn.q_norm",
    "attention.k_norm": "attn.k_norm",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_PROJECTOR = {"layer_norm": "mlp1.0", "linear_1": "mlp1.1", "linear_2": "mlp1.3"}


def _weights(model: InternVLForConditionalGeneration) -> dict[str, Tensor]:
    """The weights by OpenGVLab's names."""
    tower, weights = model.model.vision_tower, dict[str, Tensor]()
    embeddings = tower.embeddings
    weights["vision_model.embeddings.class_embedding"] = embeddings.cls_token
    weights["vision_model.embeddings.position_embedding"] = embeddings.position_embeddings
    patches = embeddings.patch_embeddings.projection
    for name, parameter in patches.named_parameters():
        weights[f"vision_model.embeddings.patch_embedding.{name}"] = parameter
    for index, layer in enumerate(tower.encoder.layer):
        prefix = f"vision_model.encoder.layers.{index}"
        attention = layer.attention
        for name in ("weight", "bias"):
            parts = [getattr(part, name) for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
            weights[f"{prefix}.attn.qkv.{name}"] = torch.cat(parts)
        for theirs, ours in _LAYER.items():
            for name, parameter in layer.get_submodule(theirs).named_parameters():
                weights[f"{prefix}.{ours}.{name}"] = parameter
        weights[f"{prefix}.ls1"], weights[f"{prefix}.ls2"] = layer.lambda_1, layer.lambda_2
    for theirs, ours in _PROJECTOR.items():
        for name, parameter in model.model.multi_modal_projector.get_submodule(theirs).named_parameters():
            weights[f"{ours}.{name}"] = parameter
    for name, parameter in model.model.language_model.named_parameters():
        weights[f"language_model.model.{name}"] = parameter
    weights["language_model.lm_head.weight"] = model.lm_head.weight
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
