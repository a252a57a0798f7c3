"""LoRA adapters with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

RANK, ALPHA = 4, 8
TARGETS = ("q_proj", "v_proj", "down_proj")


def write_adapter(model: Path, folder: Path, seed: int) -> dict[str, Tensor]:
    """Make a folder with a random adapter of a LLaVA's decoder; returns what it adds to each weight of the model."""
    generator = torch.Generator().manual_seed(seed)
    adapter, added = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if name.startswith("language_model.") and any(f"{target}.weight" in name for target in TARGETS):
            wide, narrow = weight.shape
            a = torch.randn(RANK, narrow, generator=generator) * 0.1
            b = torch.randn(wide, RANK, generator=generator) * 0.1
            layer = name.removesuffix(".weight").replace("language_model.model.", "language_model.")
            adapter[f"base_model.model.model.{layer}.lora_A.weight"] = a
            adapter[f"base_model.model.model.{layer}.lora_B.weight"] = b
            added[name] = ALPHA / RANK * (b @ a)
    folder.mkdir()
    save_file(adapter, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return added
