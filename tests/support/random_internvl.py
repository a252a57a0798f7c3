"""An InternVL with random weights: a Qwen2 behind a ViT with tiles of 6 x 6 units of 2 x 2 patches, widths of a toy."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    PreTrainedTokenizerFast,
)

from tests.support.random_llava import decoder_config

IMAGE = "<IMG_CONTEXT>"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", IMAGE, "<img>", "</img>", "<video>", "<|video_pad|>"]
TILE, PATCH, MOST_TILES = 96, 8, 6
UNITS = (TILE // PATCH // 2) ** 2
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build(
    folder: Path, *, decoder_layers: int = 3, decoder: str = "qwen2", seed: int = 0, **vision: Any
) -> Path:
    """Write a random model in the layout of published InternVL3 checkpoints (`-hf`).

    Args:
        folder: where to.
        decoder_layers: depth of the language model.
        decoder: its kind, among `DECODERS`.
        seed: of the weights.
        **vision: fields of the ViT's configuration that differ.
    """
    tokenizer = make_tokenizer()
    size = {"height": TILE, "width": TILE}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=MOST_TILES),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=UNITS,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(
            **{
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "image_size": TILE,
                "patch_size": PATCH,
                # As in InternViT-6B; the layer scale large enough that every layer matters, a norm after the last one.
                "use_qk_norm": True,
                "layer_scale_init_value": 0.5,
                "use_mean_pooling": False,
                **vision,
            }
        ),
        text_config=decoder_config(decoder, len(tokenizer), decoder_layers),
        image_token_id=SPECIAL.index(IMAGE),
        image_seq_length=UNITS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = InternVLForConditionalGeneration(config).float().eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=0.12 if "language_model" in name else 0.08)
        elif "lambda" not in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
        if "embed_tokens" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    model.save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Letters and the tokens around images, as in published checkpoints of both formats."""
    letters = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={
            "context_image_token": IMAGE,
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
