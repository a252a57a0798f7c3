"""Stage 1: the vision tower learns to carry digits, places, colours and kinds in its patches."""

import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ficoco_vllm.benchmarks.questions.scene import NUM_CLASSES
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.pixels import to_patches
from tools.demo_model.steps import Optimizers, Stage
from tools.demo_model.vision import VisionHeads, VisionTower
from tools.demo_model.windows import (
    NUM_FLAGS,
    choose_window,
    draw,
    image_flags,
    random_positions,
)

MUON_LR, ADAM_LR = 0.02, 2e-3
BACKGROUND_WEIGHT = 0.15


def patch_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the four patch labels, background weighted down.

    Args:
        logits: (B, N, sum of NUM_CLASSES), fp32.
        labels: (B, 4, N), int64.

    Returns:
        The loss, and the share of foreground patches read right for each label, (4,).
    """
    total, shares = logits.new_zeros(()), []
    for index, part in enumerate(logits.split(NUM_CLASSES, dim=-1)):
        target = labels[:, index]
        weight = torch.ones(part.shape[-1])
        weight[0] = BACKGROUND_WEIGHT
        total = total + F.cross_entropy(part.flatten(0, 1), target.flatten(), weight)
        right = (part.argmax(-1) == target)[target > 0].float()
        shares.append(right.mean() if len(right) else torch.tensor(float("nan")))
    return total, torch.stack(shares)


def train_vision(work: Path, seconds: float, seed: int = 1) -> None:
    """Train the tower for a given time and write `vision.pt` to the work folder.

    Args:
        work: folder of checkpoints; an existing `vision.pt` is continued.
        seconds: time for this stage.
        seed: for weights, images and windows.
    """
    torch.manual_seed(seed)
    shapes, tower = EasyVqa("train"), VisionTower()
    heads = VisionHeads(ARCHITECTURE, sum(NUM_CLASSES), NUM_FLAGS)
    optimizers = Optimizers(tower, list(heads.parameters()))
    path = work / "vision.pt"
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {
        "tower": tower,
        "heads": heads,
        "muon": optimizers.muon,
        "adam": optimizers.adam,
    }

    def save(stage: Stage) -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"spent": stage.spent, "step": stage.step}, path)

    stage = Stage("vision", seconds, save, save_every=400)
    if path.exists():
        saved = torch.load(path)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        stage.spent, stage.step = saved["spent"], saved["step"]
    rng = random.Random(seed + stage.step)
    for progress in stage:
        scale = min(1.0, (stage.step + 1) / 60, max(0.02, (1 - progress) / 0.45))
        window = choose_window(rng, progress)
        scenes = [draw(rng, shapes, window) for _ in range(window.batch)]
        patches = to_patches([scene.image for scene in scenes])
        position = random_positions(rng, window.batch, window.rows, window.columns)
        labels = torch.from_numpy(np.stack([scene.labels for scene in scenes])).flatten(2).long()
        flags = torch.from_numpy(np.stack([image_flags(scene) for scene in scenes]))
        patch_logits, cls_logits = heads(tower(patches, position), tower)
        early, _ = patch_loss(patch_logits[0], labels)
        late, shares = patch_loss(patch_logits[1], labels)
        read = [F.binary_cross_entropy_with_logits(logits, flags) for logits in cls_logits]
        loss = late + 0.3 * early + 3 * read[-1] + sum(read[:-1])
        optimizers.step(loss, MUON_LR * scale, ADAM_LR * scale, optimizers.rest)
        stage.images += window.batch
        size = f"{window.rows}x{window.columns}"
        for label, share in zip("dpck", shares.tolist(), strict=True):
            if share == share:  # a window without signs has no digits to read
                stage.average(f"{size} {label}", share)
        for index, value in enumerate(read):
            stage.average(f"{size} cls{index}", value.item())
