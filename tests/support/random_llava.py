"""A LLaVA with random weights: shapes like LLaVA-1.5's (24 x 24 patches and [CLS]), widths of a toy."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
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
) -> Path:
    """Write a random model in the layout of published LLaVA-1.5 checkpoints.

    Args:
        folder: where to.
        vision_layers: depth of the CLIP tower; LLaVA reads the layer before the last.
        select: "default" (patches only) or "full" (with [CLS]).
        patch_size: of images of 192 pixels.
        seed: of the weights.
        decoder_layers: depth of the language model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {
        token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": 192}, crop_size={"height": 192, "width": 192}
        ),
        tokenizer=fast,
        patch_size=patch_size,
        vision_feature_select_strategy=select,
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=vision_layers,
            num_attention_heads=4,
            image_size=192,
            patch_size=patch_size,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(vocabulary) + 3,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=decoder_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        ),
        image_token_index=4,
        image_token_id=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy=select,
        projector_hidden_act="gelu",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12 if "language_model" in name else 0.08)
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=1.0)
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
