"""Checkpoints whose decoder has quantized weights, as compressed-tensors stores them, and what they compute."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ficoco_vllm.benchmarks.harness.quantization import GROUP, Kind, quantization_config

# What the engines of the tests compute in: vLLM's CPU kernel of 4-bit weights knows bfloat16 only.
DTYPES: dict[Kind, str] = {"int8": "float32", "int4": "bfloat16"}

# vLLM refuses one elsewhere, on CPUs.
HAS_FP8_CACHE = torch.cuda.is_available() or torch.cpu._is_avx512_supported()
needs_fp8_cache = pytest.mark.needs(HAS_FP8_CACHE, "vLLM's fp8 KV cache needs a CPU with AVX-512")


def quantize(weight: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """Round a matrix to the grid of a scheme.

    Args:
        weight: (out, in) fp32.
        kind: of the scheme.

    Returns:
        Integers (out, in) int8 and scales (out, groups) fp32, of whose product the rounded matrix consists.
    """
    most = 127 if kind == "int8" else 7
    groups = weight.view(len(weight), -1, weight.shape[1] if kind == "int8" else GROUP)
    scale = groups.abs().amax(dim=-1) / most
    values = (groups / scale[..., None]).round().clamp(-most - 1, most)
    return values.view_as(weight).to(torch.int8), scale


def build(source: Path, folder: Path, kind: Kind) -> Path:
    """Quantize the decoder of a checkpoint.

    Args:
        source: with weights in fp32.
        folder: where to.
        kind: of the scheme.
    """
    shutil.copytree(source, folder)
    tensors: dict[str, Tensor] = {}
    for name, value in load_file(source / "model.safetensors").items():
        base = name.removesuffix(".weight")
        if not (base.endswith("_proj") and "language_model" in name):
            tensors[name] = value
            continue
        values, scale = quantize(value, kind)
        tensors[f"{base}.weight_scale"] = scale
        if kind == "int8":
            tensors[name] = values
        else:
            nibbles = (values.int() + 8).view(len(value), -1, 8)
            places = 4 * torch.arange(8, dtype=torch.int32)
            tensors[f"{base}.weight_packed"] = (nibbles << places).sum(dim=-1, dtype=torch.int32)
            tensors[f"{base}.weight_shape"] = torch.tensor(value.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantization_config(kind)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def quantize_oracle(decoder: nn.Module, kind: Kind) -> None:
    """Let an oracle's decoder compute with rounded weights, and with rounded activations where the scheme has them.

    Args:
        decoder: Hugging Face's Llama in fp64, with the weights of the checkpoint that was quantized.
        kind: of the scheme.
    """
    for name, module in decoder.named_modules():
        if not isinstance(module, nn.Linear) or not name.endswith("_proj"):
            continue
        values, scale = quantize(module.weight.detach().float(), kind)
        rounded = values.view(*scale.shape, -1).double() * scale.double()[..., None]
        module.weight.data = rounded.view_as(module.weight)
        if kind == "int8":
            module.register_forward_pre_hook(_round_tokens)


def to_e4m3(values: Tensor) -> Tensor:
    """FP8 with three mantissa bits, rounded towards zero, as vLLM's CPU kernel writes keys and values."""
    _, exponent = torch.frexp(values)
    step = torch.ldexp(torch.ones_like(values), (exponent - 1).clamp_min(-6) - 3)
    return (values / step).trunc() * step


def _round_tokens(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    (x,) = arguments
    scale = x.abs().amax(dim=-1, keepdim=True) / 127
    return ((x / scale).round() * scale,)
