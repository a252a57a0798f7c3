"""LLaVAs with random weights: shapes like LLaVA-1.5's (24 x 24 patches and [CLS]) or LLaVA-NeXT's, widths of a toy."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
# Model type of a decoder to its configuration, with what a Llama of this size does not have.
DECODERS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 32}),
    "mistral": (MistralConfig, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 64}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 64,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
}
# Rows and columns of tiles, as in LLaVA-NeXT.
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build(
    folder: Path,
    *,
    vision_layers: int = 8,
    select: str = "default",
    patch_size: int = 8,
    seed: int = 0,
    decoder_layers: int = 3,
    decoder: str = "llama",
) -> Path:
    """Write a random model in the layout of published LLaVA-1.5 checkpoints.

    Args:
        folder: where to.
        vision_layers: depth of the CLIP tower; LLaVA reads the layer before the last.
        select: "default" (patches only) or "full" (with [CLS]).
        patch_size: of images of 192 pixels.
        seed: of the weights.
        decoder_layers: depth of the language model.
        decoder: its model type, a key of `DECODERS`.
    """
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 192}, crop_size={"height": 192, "width": 192}
        ),
        **_reading(patch_size, select),
    )
    processor.save_pretrained(folder)
    parts = _parts(vision_layers, 192, patch_size, decoder_layers, decoder)
    config = LlavaConfig(**parts, vision_feature_select_strategy=select)
    torch.manual_seed(seed)
    return _save(LlavaForConditionalGeneration(config), folder)


def build_next(
    folder: Path,
    *,
    vision_layers: int = 8,
    tile_size: int = 96,
    patch_size: int = 8,
    seed: int = 0,
    decoder_layers: int = 3,
    decoder: str = "llama",
) -> Path:
    """Write a random model in the layout of published LLaVA-NeXT checkpoints, with their five shapes of grids of tiles.

    Args:
        folder: where to.
        vision_layers: depth of the CLIP tower; LLaVA reads the layer before the last.
        tile_size: height and width of a tile in pixels.
        patch_size: height and width of a patch in pixels.
        seed: of the weights.
        decoder_layers: depth of the language model.
        decoder: its model type, a key of `DECODERS`.
    """
    pinpoints = [[rows * tile_size, columns * tile_size] for rows, columns in GRIDS]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": tile_size},
            crop_size={"height": tile_size, "width": tile_size},
            image_grid_pinpoints=pinpoints,
        ),
        **_reading(patch_size, "default"),
    )
    processor.save_pretrained(folder)
    parts = _parts(vision_layers, tile_size, patch_size, decoder_layers, decoder)
    config = LlavaNextConfig(
        **parts, vision_feature_select_strategy="default", image_grid_pinpoints=pinpoints
    )
    torch.manual_seed(seed)
    return _save(LlavaNextForConditionalGeneration(config), folder)


def _reading(patch_size: int, select: str) -> dict[str, Any]:
    """Common arguments of both processors."""
    return {
        "tokenizer": _tokenizer(),
        "patch_size": patch_size,
        "vision_feature_select_strategy": select,
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = _vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}


def decoder_config(name: str, num_tokens: int, num_layers: int) -> PreTrainedConfig:
    """A decoder of toy widths.

    Args:
        name: among `DECODERS`.
        num_tokens: of the vocabulary.
        num_layers: of the decoder.
    """
    kind, more = DECODERS[name]
    return kind(
        vocab_size=num_tokens,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        tie_word_embeddings=False,
        architectures=[kind.__name__.replace("Config", "ForCausalLM")],
        **more,
    )


def _parts(
    vision_layers: int, image_size: int, patch_size: int, decoder_layers: int, decoder: str
) -> dict[str, Any]:
    """Common fields of both configurations."""
    return {
        "vision_config": CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=128,
        ),
        "text_config": decoder_config(decoder, len(_vocabulary()) + 3, decoder_layers),
        "image_token_index": 4,
        "image_token_id": 4,
        "vision_feature_layer": -2,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
    }


def _save(model: PreTrainedModel, folder: Path) -> Path:
    model = model.float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12 if "language_model" in name else 0.08)
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=1.0)
        # What only some decoders have must make a difference.
        if "language_model" in name and name.endswith(("bias", "q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.5)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    save_file(
        {_published_name(key): value for key, value in load_file(weights).items()}, weights, {"format": "pt"}
    )
    return folder


def _published_name(key: str) -> str:
    """Transformers 5 leaves out a level that published checkpoints, and vLLM, have."""
    key = key.removeprefix("model.")
    if key.startswith("vision_tower.") and not key.startswith("vision_tower.vision_model."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return key
