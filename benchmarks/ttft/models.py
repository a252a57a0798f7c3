"""The models of `make bench-ttft`: true widths, the decoder cut to a few layers, no weights, no download."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ficoco_vllm import demo_model
from ficoco_vllm.benchmarks.harness import engine, model
from ficoco_vllm.reduction.cost import KNOWN_MODELS

NUM_TEXT_TOKENS = 60
_INTERNVL = {
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
}
_QWEN3_VL = {
    "vision_start_token": "<|vision_start|>",
    "image_token": "<|image_pad|>",
    "vision_end_token": "<|vision_end|>",
    "video_token": "<|video_pad|>",
}


@dataclass(frozen=True)
class Model:
    """One model of the benchmark.

    Attributes:
        checkpoint: whose widths it has.
        keeps: visual tokens of an image that are kept, from all to about a ninth.
        side: height and width of the image in pixels.
        image: tokens of the prompt that stand for an image.
        num_around: tokens of an image's span beside the visual ones.
        depths: decoder layers of two runs; two engines of the deeper one fit 24 GB.
    """

    checkpoint: str
    keeps: tuple[int, ...]
    side: int
    image: tuple[str, ...]
    num_around: int
    depths: tuple[int, int] = (8, 16)

    @property
    def images(self) -> dict[str, Any] | None:
        """Settings of the image processor that are not those of the published checkpoint."""
        if self.family != "qwen3_vl":
            return None
        # vLLM profiles an image of the most pixels, which would not fit the benchmark's prompts.
        return {"size": {"shortest_edge": 256**2, "longest_edge": self.side**2}}

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return int(KNOWN_MODELS[self.checkpoint]["text_config"]["num_hidden_layers"])

    @property
    def family(self) -> str:
        """`model_type` of its configuration."""
        return str(KNOWN_MODELS[self.checkpoint]["model_type"])


MODELS: Mapping[str, Model] = {
    **{
        size: Model(checkpoint, (576, 192, 128, 64), 336, ("<image>",), 0)
        for size, checkpoint in model.CHECKPOINTS.items()
    },
    "internvl3-8b": Model("OpenGVLab/InternVL3-8B-hf", (256, 64, 28), 448, ("<IMG_CONTEXT>",), 2, (4, 8)),
    "qwen3-vl-8b": Model(
        "Qwen/Qwen3-VL-8B-Instruct", (256, 64, 28), 512, tuple(_QWEN3_VL.values())[:3], 2, (4, 8)
    ),
}


def request(llm: Any, seed: int, **kwargs: Any) -> dict[str, Any]:
    """A prompt of text and of one random image of the size for an engine's model; `kwargs` as of `engine.request`."""
    family = llm.llm_engine.vllm_config.model_config.hf_config.model_type
    used = next((one for one in MODELS.values() if one.family == family), MODELS["7b"])
    return engine.image_request(llm, NUM_TEXT_TOKENS, seed, used.side, used.image, **kwargs)


def write(folder: Path, num_layers: int, size: str) -> Path:
    """Write one of `MODELS` with a cut decoder; see `harness.model.write`."""
    used = MODELS[size]
    if used.family == "llava":
        return model.write(folder, num_layers, size)
    make = {"internvl": _internvl, "qwen3_vl": _qwen3_vl}[used.family]
    values = make(folder, used, model.config(num_layers, used.checkpoint)) | {"dtype": "bfloat16"}
    values["text_config"] |= {"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    return folder


def _internvl(folder: Path, used: Model, values: dict[str, Any]) -> dict[str, Any]:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    tokenizer = _tokenizer(_INTERNVL)
    size = {"height": used.side, "width": used.side}
    InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, min_patches=1, max_patches=12),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=used.keeps[0],
    ).save_pretrained(folder)
    return values | {
        "architectures": ["InternVLForConditionalGeneration"],
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        "text_config": values["text_config"] | {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1e6},
    }


def _qwen3_vl(folder: Path, used: Model, values: dict[str, Any]) -> dict[str, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = _tokenizer(_QWEN3_VL)
    vision = values["vision_config"]
    settings = {
        **(used.images or {}),
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**settings),
    ).save_pretrained(folder)
    rotary = {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    }
    return values | {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        **{f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in _QWEN3_VL.items()},
        "text_config": values["text_config"] | {"rope_parameters": rotary},
    }


def _tokenizer(special: Mapping[str, str]) -> Any:
    """The demo model's tokenizer with a model's special tokens, which its processor reads by attribute."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model.path(), extra_special_tokens=dict(special))
