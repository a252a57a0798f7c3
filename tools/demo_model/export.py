"""Write the trained parts as a Hugging Face LLaVA that transformers and vLLM both load."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tools.demo_model.architecture import ARCHITECTURE, IMAGE_MEAN, IMAGE_STD
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.tokenizer import BOS, EOS, IMAGE, PAD, SPECIAL
from tools.demo_model.vision import VisionTower

MAX_NEW_TOKENS = 16

# LLaVA-1.5: a system message has no prefix, every other turn names its speaker, images precede the text.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ':' }}"
    "{{ ' ' if message['role'] == 'user' else '' }}{% endif %}"
    "{% if message['content'] is string %}"
    "{{ ' ' + message['content'] if message['role'] == 'assistant' else message['content'] }}"
    "{% else %}"
    "{% for part in message['content'] if part['type'] in ['image', 'image_url'] %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}"
    "{{ ' ' + part['text'] if message['role'] == 'assistant' else part['text'] }}"
    "{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def llava_config(vocabulary: int) -> LlavaConfig:
    """The configuration of the whole model."""
    sizes = ARCHITECTURE
    vision = CLIPVisionConfig(
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.vision_mlp,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.num_heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="gelu",
        projection_dim=sizes.hidden_size,
        layer_norm_eps=sizes.vision_norm_eps,
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.decoder_mlp,
        num_hidden_layers=sizes.decoder_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        max_position_embeddings=sizes.max_position_embeddings,
        rms_norm_eps=sizes.decoder_norm_eps,
        rope_theta=sizes.rope_theta,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=sizes.num_patches,
        multimodal_projector_bias=True,
        tie_word_embeddings=False,
        architectures=["LlavaForConditionalGeneration"],
        dtype="bfloat16",
    )


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor, tokenizer and chat template in one."""
    side = ARCHITECTURE.image_size
    image_processor = CLIPImageProcessor(
        do_resize=True,
        size={"shortest_edge": side},
        do_center_crop=True,
        crop_size={"height": side, "width": side},
        resample=3,
        do_rescale=True,
        do_normalize=True,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=ARCHITECTURE.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=SPECIAL[IMAGE],
        chat_template=CHAT_TEMPLATE,
    )


def views_by_name(tower: VisionTower, projector: Projector, decoder: Decoder) -> dict[str, Tensor]:
    """Every weight, as a view, under the name that published LLaVA checkpoints use.

    transformers 5 writes the tower as `vision_tower.*` and reads both forms; vLLM reads only
    `vision_tower.vision_model.*`.
    """
    D, P = ARCHITECTURE.hidden_size, ARCHITECTURE.patch_size
    named: dict[str, Tensor] = {}

    def put(name: str, module: nn.Module) -> None:
        for key, value in module.state_dict().items():
            named[f"{name}.{key}"] = value

    root = "vision_tower.vision_model"
    named[f"{root}.embeddings.class_embedding"] = tower.class_embedding
    named[f"{root}.embeddings.patch_embedding.weight"] = tower.patch.view(D, 3, P, P)
    named[f"{root}.embeddings.position_embedding.weight"] = tower.position
    put(f"{root}.pre_layrnorm", tower.pre_norm)
    put(f"{root}.post_layernorm", tower.post_norm)
    for index, layer in enumerate(tower.layers):
        name = f"{root}.encoder.layers.{index}"
        put(f"{name}.layer_norm1", layer.norm1)
        put(f"{name}.layer_norm2", layer.norm2)
        put(f"{name}.self_attn.out_proj", layer.out)
        put(f"{name}.mlp.fc1", layer.up)
        put(f"{name}.mlp.fc2", layer.down)
        for part, weight, bias in zip("qkv", layer.qkv.weight.split(D), layer.qkv.bias.split(D), strict=True):
            named[f"{name}.self_attn.{part}_proj.weight"] = weight
            named[f"{name}.self_attn.{part}_proj.bias"] = bias
    put("multi_modal_projector.linear_1", projector.first)
    put("multi_modal_projector.linear_2", projector.second)
    root = "language_model.model"
    named[f"{root}.embed_tokens.weight"] = decoder.embedding
    named[f"{root}.norm.weight"] = decoder.norm
    named["language_model.lm_head.weight"] = decoder.head
    for index, layer in enumerate(decoder.layers):
        name = f"{root}.layers.{index}"
        for part, weight in zip("qkv", layer.qkv.split(D), strict=True):
            named[f"{name}.self_attn.{part}_proj.weight"] = weight
        named[f"{name}.self_attn.o_proj.weight"] = layer.out
        gate, up = layer.gate_up.chunk(2)
        named[f"{name}.mlp.gate_proj.weight"], named[f"{name}.mlp.up_proj.weight"] = gate, up
        named[f"{name}.mlp.down_proj.weight"] = layer.down
        named[f"{name}.input_layernorm.weight"] = layer.norm1
        named[f"{name}.post_attention_layernorm.weight"] = layer.norm2
    return {name: value.detach() for name, value in named.items()}


def export(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    tower: VisionTower,
    projector: Projector,
    decoder: Decoder,
) -> None:
    """Write weights, configurations, tokenizer and processor.

    Args:
        folder: created if missing; files of other names are kept.
        tokenizer: the demo model's tokenizer.
        tower: the vision tower.
        projector: the projector.
        decoder: the decoder, grown to its full depth.
    """
    folder.mkdir(parents=True, exist_ok=True)
    llava_config(len(tokenizer)).save_pretrained(folder)
    processor(tokenizer).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
    ).save_pretrained(folder)
    weights = folder / "model.safetensors"
    views = views_by_name(tower, projector, decoder)
    stored = {name: view.to(torch.bfloat16).clone().contiguous() for name, view in views.items()}
    save_file(stored, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
