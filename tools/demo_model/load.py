"""Read an exported model back into the compact modules; the inverse of `export.views_by_name`."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.decoder import Decoder, Projector
from tools.demo_model.export import views_by_name
from tools.demo_model.vision import VisionTower


@torch.no_grad()
def load_exported(folder: Path) -> tuple[VisionTower, Projector, Decoder]:
    """The three parts with the exported weights, in fp32.

    Args:
        folder: written by `export`.

    Raises:
        ValueError: the file holds other weights than the architecture has.
    """
    stored = load_file(folder / "model.safetensors")
    vocabulary = len(stored["language_model.lm_head.weight"])
    tower, projector = VisionTower(), Projector()
    decoder = Decoder(vocabulary, ARCHITECTURE.decoder_layers)
    targets = views_by_name(tower, projector, decoder)
    if targets.keys() != stored.keys():
        raise ValueError(f"unexpected weights in {folder}: {sorted(targets.keys() ^ stored.keys())}")
    for name, target in targets.items():
        target.copy_(stored[name])
    return tower, projector, decoder
