"""A Qwen3-VL with random weights: units of 2 x 2 patches, dynamic resolution, deepstack, M-RoPE; widths of a toy."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

VISION_START, VISION_END, IMAGE, VIDEO = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE, VIDEO]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Pixels on a side of a patch, and patches on a side of a unit.
PATCH, MERGE = 8, 2
# The fewest and the most units of an image.
LEAST_UNITS, MOST_UNITS = 4, 160


def build(folder: Path, *, depth: int = 6, decoder_layers: int = 4, experts: int = 0, seed: int = 0) -> Path:
    """Write a random model in the layout of published Qwen3-VL checkpoints.

    Args:
        folder: where to.
        depth: layers of the tower.
        decoder_layers: depth of the language model.
        experts: in each of its layers, two of them for each token; 0 is the dense model.
        seed: of the weights.
    """
    tokenizer = _tokenizer()
    size = {
        "shortest_edge": LEAST_UNITS * (PATCH * MERGE) ** 2,
        "longest_edge": MOST_UNITS * (PATCH * MERGE) ** 2,
    }
    patches = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2}
    mean = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size, **patches, **mean),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size={**size, "longest_edge": 4 * size["longest_edge"]}, **patches, **mean
        ),
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    mixture = {
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
    }
    config = (Qwen3VLMoeConfig if experts else Qwen3VLConfig)(
        vision_config={
            "depth": depth,
            "hidden_size": 128,
            "intermediate_size": 192,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [1, 3, depth - 1],
        },
        text_config={
            "vocab_size": len(_vocabulary()) + 1,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": decoder_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None,
            "pad_token_id": ids["<|endoftext|>"],
            **(mixture if experts else {}),
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    architecture = Qwen3VLMoeForConditionalGeneration if experts else Qwen3VLForConditionalGeneration
    model = architecture(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            std = 1.0 if "embed_tokens" in name else 0.12 if "language_model" in name else 0.08
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    if experts:
        _transpose_experts(folder / "model.safetensors")
    return folder


def _transpose_experts(file: Path) -> None:
    """Published checkpoints hold these matrices transposed; transformers reads both and writes the other."""
    weights = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file, metadata={"format": "pt"})


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab=_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _vocabulary() -> dict[str, int]:
    return {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
