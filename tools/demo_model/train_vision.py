"""Stage 1: the vision tower learns to carry digits, places, colours and kinds in its patches."""

import random
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ficoco_vllm.benchmarks.questions.scene import NUM_CLASSES
from ficoco_vllm.benchmarks.questions.shapes import EasyVqa
from tools.demo_model.architecture import ARCHITECTURE
from tools.demo_model.muon import Muon
from tools.demo_model.pixels import to_patches
from tools.demo_model.steps import set_rates
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
    shapes = EasyVqa("train")
    tower = VisionTower()
    heads = VisionHeads(ARCHITECTURE, sum(NUM_CLASSES), NUM_FLAGS)
    muon = Muon(tower.matrices(), lr=MUON_LR)
    inside = {id(param) for group in tower.matrices() for param in group.params}
    others = [param for module in (tower, heads) for param in module.parameters() if id(param) not in inside]
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    spent, step = 0.0, 0
    path = work / "vision.pt"
    parts: dict[str, nn.Module | torch.optim.Optimizer] = {
        "tower": tower,
        "heads": heads,
        "muon": muon,
        "adam": adam,
    }
    if path.exists():
        saved = torch.load(path)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        spent, step = saved["spent"], saved["step"]
    rng = random.Random(seed + step)
    running: dict[str, float] = {}
    started = time.monotonic()
    images, begin = 0, started - spent
    with tqdm(total=round(seconds), initial=round(spent), unit="s", desc="vision") as bar:
        while (spent := time.monotonic() - begin) < seconds:
            progress = spent / seconds
            scale = min(1.0, (step + 1) / 60, max(0.02, (1 - progress) / 0.45))
            set_rates(muon, adam, MUON_LR * scale, ADAM_LR * scale)
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
            muon.zero_grad()
            adam.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(others, 1.0)
            muon.step()
            adam.step()
            step += 1
            images += window.batch
            size = f"{window.rows}x{window.columns}"
            values = {f"{size} {label}": float(share) for label, share in zip("dpck", shares, strict=True)}
            values |= {f"{size} cls{index}": value.item() for index, value in enumerate(read)}
            for key, value in values.items():
                if value == value:  # a window without signs has no digits to read
                    running[key] = 0.95 * running.get(key, value) + 0.05 * value
            if step % 50 == 0:
                bar.update(round(spent) - bar.n)
                bar.write(
                    f"vision {step} {images / (time.monotonic() - started):.0f} images/s "
                    + " ".join(f"{key}={value:.3f}" for key, value in sorted(running.items()))
                )
            if step % 400 == 0:
                save(path, parts, spent, step)
    save(path, parts, seconds, step)


def save(path: Path, parts: Mapping[str, nn.Module | torch.optim.Optimizer], spent: float, step: int) -> None:
    """Write weights and optimizers with the stage's progress."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"spent": spent, "step": step}, path)
