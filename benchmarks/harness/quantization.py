"""Schemes of quantized decoder weights, as compressed-tensors names them in a checkpoint's configuration."""

from typing import Any, Literal

Kind = Literal["int8", "int4"]
Weights = Literal["plain", "int8", "int4"]
GROUP = 32
# As in published checkpoints: tower, projector and language head stay as they are.
IGNORED = ["lm_head", "re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
_INT = {"type": "int", "symmetric": True}
_SCHEMES: dict[Kind, dict[str, Any]] = {
    # W8A8: a scale for each output channel; activations are quantized at run time, with a scale for each token.
    "int8": {
        "format": "int-quantized",
        "weights": {**_INT, "num_bits": 8, "strategy": "channel", "dynamic": False},
        "input_activations": {**_INT, "num_bits": 8, "strategy": "token", "dynamic": True},
    },
    # W4A16: a scale for each 32 inputs of an output channel.
    "int4": {
        "format": "pack-quantized",
        "weights": {**_INT, "num_bits": 4, "strategy": "group", "group_size": GROUP, "dynamic": False},
        "input_activations": None,
    },
}


def quantization_config(kind: Kind) -> dict[str, Any]:
    """The entry `quantization_config` of a checkpoint's `config.json`."""
    scheme = dict(_SCHEMES[kind])
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": scheme.pop("format"),
        "ignore": IGNORED,
        "config_groups": {"group_0": {"targets": ["Linear"], **scheme}},
    }


def runs_here(weights: Weights, dtype: str = "bfloat16") -> bool:
    """Whether vLLM can multiply by such weights on this machine: on a CPU, 4-bit ones need bfloat16 and AVX-512."""
    import torch
    from vllm.platforms import current_platform

    if weights != "int4" or not current_platform.is_cpu():
        return True
    current_platform.import_kernels()
    return dtype == "bfloat16" and hasattr(torch.ops._C, "cpu_gemm_wna16")
